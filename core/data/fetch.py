"""Brings the public poster set into a folder: download or copy, unpack, check, then show.

The set was collected by W.-T. Chu and H.-J. Guo ("Movie genre classification based on poster images
with deep neural networks", 2017). Only `train.csv` and `Images/*` are taken out of an archive, each
by its plain file name, so that no entry can land elsewhere. The folder appears when all is there.
"""

from __future__ import annotations

import csv
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError
from ..staging import staged_folder
from .download import Progress, download

POSTERS_URL = "https://github.com/laxmimerit/Movies-Poster_Dataset/archive/HEAD.zip"
"""GitHub's archive of the repository's main branch, whatever its name is."""

_CSV, _IMAGES = "train.csv", "Images"
_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
_MAX_UNPACKED_BYTES = 8 << 30
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PosterCounts:
    """What a fetched folder holds."""

    num_rows: int
    """Rows of the CSV; an id may come twice."""
    num_classes: int
    """One-hot columns of the CSV."""
    num_images: int
    """Pictures; those without a row have no labels."""


PUBLIC_COUNTS = PosterCounts(num_rows=7254, num_classes=25, num_images=7867)
"""The whole public set."""


def fetch_posters(
    folder: Path, *, source: str | Path = POSTERS_URL, progress: Progress | None = None
) -> PosterCounts:
    """Put a poster set into `folder` as `train.csv` and `Images/`, and count it.

    A download that was interrupted goes on from `FOLDER.zip.part` beside the folder. Compare the
    answer with `PUBLIC_COUNTS`: a mirror may hold fewer posters, the public archive may not.

    Args:
        folder: must not exist, or be empty.
        source: an http(s) URL of a zip file, a zip file, or a folder with `train.csv` and `Images`.
        progress: called with bytes done and bytes in total (None if unknown) while downloading.

    Raises:
        InputError: the source cannot be reached or read, has no posters in this layout, has rows
            without pictures, or is the public archive with other counts than the public set.
    """
    with staged_folder(folder) as staging:
        if str(source).lower().startswith(("http://", "https://")):
            archive = Path(folder).absolute().with_name(f"{Path(folder).absolute().name}.zip")
            counts = _fetch_url(str(source), archive, staging, progress)
        else:
            counts = _fetch_local(Path(source), staging)
    return counts


def check_posters(folder: Path, *, where: str) -> PosterCounts:
    """Count a folder's rows, classes and pictures. Raises InputError if a row has no picture."""
    images = {path.stem for path in (folder / _IMAGES).iterdir()}
    try:
        with open(folder / _CSV, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
        column = [name.strip().lower() for name in header].index("id")
        ids = [row[column] for row in rows if row]
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(
            f"{_CSV} is not a table with a column Id",
            where=where,
            hint="expected: Id, Genre, then a 0/1 column for each genre",
        ) from error
    if not ids:
        raise InputError(f"{_CSV} has no rows", where=where)
    missing = [poster_id for poster_id in ids if poster_id not in images]
    if missing:
        raise InputError(
            f"{len(missing):,} of {len(ids):,} rows of {_CSV} have no picture in {_IMAGES}/: "
            f"{', '.join(missing[:_SHOWN])}{', ...' if len(missing) > _SHOWN else ''}",
            where=where,
            hint="the set is incomplete: get it again, or take these rows out of the CSV",
        )
    num_classes = sum(name.strip().lower() not in ("id", "genre") for name in header)
    return PosterCounts(num_rows=len(ids), num_classes=num_classes, num_images=len(images))


def _fetch_url(url: str, archive: Path, staging: Path, progress: Progress | None) -> PosterCounts:
    """Download, unpack and check; the archive is kept only if it may be of use."""
    try:
        download(url, archive, progress=progress)
    except InputError as error:
        raise InputError(
            error.problem,
            where=error.where,
            hint=f"without internet here: fetch {url} elsewhere, bring the file over, then\n"
            "  tuner data fetch posters --from FILE",
        ) from error
    try:
        _unpack(archive, staging, where=url)
        counts = check_posters(staging, where=url)
    except InputError:
        archive.unlink(missing_ok=True)
        raise
    if url == POSTERS_URL and counts != PUBLIC_COUNTS:
        raise InputError(
            f"the archive holds {_words(counts)}, but the public set has {_words(PUBLIC_COUNTS)}",
            where=url,
            hint=f"to use it all the same: tuner data fetch posters --from {archive}",
        )
    archive.unlink()
    return counts


def _fetch_local(source: Path, staging: Path) -> PosterCounts:
    """Unpack a zip file, or copy a folder."""
    if source.is_dir():
        if not (source / _CSV).is_file() or not (source / _IMAGES).is_dir():
            raise _no_layout(str(source))
        shutil.copyfile(source / _CSV, staging / _CSV)
        (staging / _IMAGES).mkdir()
        for path in sorted((source / _IMAGES).iterdir()):
            if path.is_file() and path.suffix.lower() in _EXTENSIONS:
                shutil.copyfile(path, staging / _IMAGES / path.name)
    elif source.is_file():
        _unpack(source, staging, where=str(source))
    else:
        raise InputError(
            "no such file or folder",
            where=str(source),
            hint=f"expected a zip file, a folder with {_CSV} and {_IMAGES}/, or a URL",
        )
    return check_posters(staging, where=str(source))


def _unpack(archive: Path, staging: Path, *, where: str) -> None:
    """Extract the CSV and the pictures beside it, wherever in the archive they lie."""
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [e for e in file.infolist() if not e.filename.endswith("/")]
            _refuse_unsafe(entries, where)
            tables = [e for e in entries if PurePosixPath(e.filename).name == _CSV]
            if not tables:
                raise _no_layout(where)
            table = min(tables, key=lambda entry: len(PurePosixPath(entry.filename).parts))
            folder = PurePosixPath(table.filename).parent / _IMAGES
            (staging / _IMAGES).mkdir()
            for entry in entries:
                path = PurePosixPath(entry.filename)
                if entry is table:
                    target = staging / _CSV
                elif path.parent == folder and path.suffix.lower() in _EXTENSIONS:
                    target = staging / _IMAGES / path.name
                else:
                    continue
                with file.open(entry) as packed, open(target, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"not a readable zip file: {error}", where=where, hint="it is damaged: get it again"
        ) from error


def _refuse_unsafe(entries: Iterable[zipfile.ZipInfo], where: str) -> None:
    """An honest archive has no way out of its folder, no links, and a sane size."""
    total = 0
    for entry in entries:
        name = entry.filename.replace("\\", "/")
        parts = name.split("/")
        is_link = stat.S_ISLNK(entry.external_attr >> 16)
        if name.startswith("/") or ".." in parts or ":" in parts[0] or is_link:
            raise InputError(f"unsafe entry {entry.filename!r} in the archive", where=where)
        total += entry.file_size
    if total > _MAX_UNPACKED_BYTES:
        raise InputError(
            f"the archive unpacks to {total:,} bytes, more than {_MAX_UNPACKED_BYTES:,}",
            where=where,
        )


def _no_layout(where: str) -> InputError:
    return InputError(
        f"holds no poster set: {_CSV} beside a folder {_IMAGES}/ is expected", where=where
    )


def _words(counts: PosterCounts) -> str:
    return (
        f"{counts.num_rows:,} rows, {counts.num_classes} classes and {counts.num_images:,} pictures"
    )
