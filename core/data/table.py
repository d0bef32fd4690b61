"""The labelled pictures: ids, paths, multi-hot targets and class names.

A table is read once, checked in full, and never changed; `select` makes a smaller one. Rows that
repeat an id are kept (the posters' totals count them) as long as their labels agree. Pictures are
found and their paths judged here, but not opened: that is `core.images.pictures.check_pictures`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..images.pictures import EXTENSIONS, default_threads
from .columns import Columns, read_columns

_SHOWN = 5
"""How many offenders an error lists."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Labelled pictures. N rows, C classes. Safe to pickle; refers to files, holds no pixels."""

    name: str
    """Name of the data folder."""
    root: Path
    """The data folder, absolute."""
    ids: tuple[str, ...]
    """One a row; may repeat, then with equal labels."""
    paths: tuple[Path, ...]
    """One a row, absolute."""
    targets_NC: npt.NDArray[np.uint8]
    """1 where a row has a class' label, else 0."""
    class_names: tuple[str, ...]
    given_split: tuple[str, ...] | None = None
    """`train`, `validation` or `test` for each row, if the CSV says so."""
    ignored_columns: tuple[str, ...] = ()
    """Columns of the CSV that hold neither ids nor labels."""

    @property
    def num_images(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def content_hashes(self) -> tuple[bytes, ...]:
        """BLAKE2b of each picture file, 16 bytes a row. Reads every file, once for each table.

        Raises:
            InputError: a file cannot be read.
        """
        with ThreadPoolExecutor(default_threads()) as pool:
            return tuple(pool.map(_content_hash, self.paths))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of ids, labels, class names and picture contents; not of paths, so that a
        moved or copied folder keeps it. Reads every picture file the first time."""
        digest = hashlib.sha256()
        for text in (*self.class_names, "", *self.ids):
            digest.update(text.encode() + b"\0")
        digest.update(np.ascontiguousarray(self.targets_NC).tobytes())
        digest.update(b"".join(self.content_hashes))
        return digest.hexdigest()

    def picture_fingerprint(self) -> str:
        """SHA-256 (hex) of the picture contents in row order: what decoded pictures and features
        depend on."""
        return hashlib.sha256(b"".join(self.content_hashes)).hexdigest()

    def select(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Table:
        """The table of these rows, in this order."""
        chosen = [int(row) for row in rows]
        split = self.given_split
        table = Table(
            name=self.name,
            root=self.root,
            ids=tuple(self.ids[row] for row in chosen),
            paths=tuple(self.paths[row] for row in chosen),
            targets_NC=self.targets_NC[chosen],
            class_names=self.class_names,
            given_split=None if split is None else tuple(split[row] for row in chosen),
            ignored_columns=self.ignored_columns,
        )
        if "content_hashes" in self.__dict__:  # Hand on what was read already.
            table.__dict__["content_hashes"] = tuple(self.content_hashes[row] for row in chosen)
        return table


def read_table(
    data: str | Path,
    *,
    csv: str | Path | None = None,
    images: str | Path | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    split_column: str | None = None,
    allow_missing: bool = False,
) -> Table:
    """Read a folder of labelled pictures and check everything but the pixels.

    Three layouts of the CSV are understood: the posters' (Id, Genre, one 0/1 column a class), any
    other with one 0/1 column a class, and a column of labels (`Action|Drama`, `Action, Drama` or
    `['Drama', 'Romance']`). Columns of other text are passed over and listed in the result.

    Args:
        data: the folder.
        csv: the CSV, as a path or inside `data`; None for `train.csv` or the only one there.
        images: the folder of the pictures, as a path or inside `data`; None for `Images`, `images`
            or `data` itself.
        id_column: names the pictures: ids without ending, or paths; None for `Id` and the like.
        label_column: the column of labels; None for a usual name, used if no 0/1 columns exist.
        delimiter: separates labels; None for the first of `|`, `;` and `,` that occurs.
        split_column: says `train`, `validation` or `test`; None for a usual name (split).
        allow_missing: keep rows whose picture is missing (`check_pictures` then reports them).

    Raises:
        InputError: anything amiss, naming file, row and column where there is one.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(data))
    root = Path(os.path.realpath(folder))
    csv_file = _find_csv(root, csv)
    columns = read_columns(
        csv_file,
        id_column=id_column,
        label_column=label_column,
        delimiter=delimiter,
        split_column=split_column,
    )
    _check_rows(csv_file, columns)
    return Table(
        name=root.name,
        root=root,
        ids=columns.ids,
        paths=_find_pictures(csv_file, columns, root, images, allow_missing),
        targets_NC=columns.targets_NC,
        class_names=columns.class_names,
        given_split=columns.given_split,
        ignored_columns=columns.ignored,
    )


def _find_csv(root: Path, csv: str | Path | None) -> Path:
    if csv is not None:
        inside = root / csv
        return inside if inside.is_file() else Path(csv)
    if (root / "train.csv").is_file():
        return root / "train.csv"
    found = sorted(p for p in root.iterdir() if p.suffix.lower() == ".csv")
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found)
    problem = f"{len(found)} CSV files and none is train.csv: {names}" if found else "no CSV file"
    raise InputError(problem, where=str(root), hint="name it with --csv")


def _check_rows(csv: Path, columns: Columns) -> None:
    """Rules over all rows: enough of them, and one set of labels for each id."""
    num_rows, num_classes = columns.targets_NC.shape
    if num_rows < num_classes:
        raise InputError(
            f"{num_rows} rows are fewer than the {num_classes} classes",
            where=str(csv),
            hint="if these are no classes, name the column of labels with --label-column",
        )
    first: dict[str, int] = {}
    differing: dict[str, str] = {}
    for at, name in enumerate(columns.ids):
        before = first.setdefault(name, at)
        if not np.array_equal(columns.targets_NC[before], columns.targets_NC[at]):
            differing.setdefault(name, f"{name} (rows {columns.rows[before]}, {columns.rows[at]})")
    if differing:
        raise InputError(
            f"{len(differing)} ids are repeated with different labels: "
            + _first_ones(list(differing.values())),
            where=str(csv),
            hint="keep one row of each, or make their labels equal",
        )


def _find_pictures(
    csv: Path, columns: Columns, root: Path, images: str | Path | None, allow_missing: bool
) -> tuple[Path, ...]:
    folder, fence = _find_images(root, images)
    by_stem = _list_pictures(folder)
    paths, missing = [], []
    for at, name in enumerate(columns.files):
        path = _locate(csv, name, columns.rows[at], folder, root, by_stem)
        # Resolved before it is judged: `..` and symbolic links both leave the folder that way.
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(fence):
            raise InputError(
                f"row {columns.rows[at]} holds {name!r}, which leaves the folder {fence}",
                where=str(csv),
                hint="put the pictures into the data folder, or name theirs with --images",
            )
        if not real.is_file():
            missing.append(f"{name} (row {columns.rows[at]})")
        paths.append(real)
    if missing and not allow_missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} pictures are missing: {_first_ones(missing)}",
            where=str(folder),
            hint=f"looked for as ID with one of {' '.join(EXTENSIONS)}, or as a path",
        )
    return tuple(paths)


def _find_images(root: Path, images: str | Path | None) -> tuple[Path, Path]:
    """The folder of pictures, and the folder that no picture may leave."""
    if images is None:
        folder = next((root / n for n in ("Images", "images") if (root / n).is_dir()), root)
        return folder, root
    folder = root / images if (root / images).is_dir() else Path(images)
    if not folder.is_dir():
        raise InputError("there is no such folder of pictures", where=str(images))
    real = Path(os.path.realpath(folder))
    return real, root if real.is_relative_to(root) else real


def _list_pictures(folder: Path) -> dict[str, list[str]]:
    """File names by their stem: one listing instead of a look for each row and ending."""
    by_stem: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        if extension.lower() in EXTENSIONS:
            by_stem.setdefault(stem, []).append(name)
    return by_stem


def _locate(
    csv: Path, name: str, row: int, folder: Path, root: Path, by_stem: dict[str, list[str]]
) -> Path:
    """Where the picture called `name` is, or would be: nothing is checked here."""
    if os.path.splitext(name)[1].lower() in EXTENSIONS:
        return folder / name if (folder / name).exists() else root / name
    found = by_stem.get(name, [])
    if len(found) > 1:
        problem = f"row {row}: {name!r} could be any of {', '.join(found)}"
        raise InputError(problem, where=str(csv), hint="keep one of them, or give a path column")
    if found:
        return folder / found[0]
    if os.sep in name:
        candidates = [folder / (name + extension) for extension in EXTENSIONS]
        return next((path for path in candidates if path.exists()), candidates[0])
    return folder / (name + EXTENSIONS[0])


def _content_hash(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise InputError(f"the picture cannot be read ({error})", where=str(path)) from error


def _first_ones(items: list[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}, ..."
