"""Which columns of a CSV name the pictures and which hold the labels.

Everything is read as text, so that the class called `N/A` stays a name and a number that is not 0
or 1 can be quoted as it was written. Rows are counted as a spreadsheet shows them: the header is
row 1. One-hot columns win over a label column, as in the posters' 27 columns.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import InputError

ID_NAMES = ("id", "image_id", "imdb_id", "imdbid")
PATH_NAMES = ("path", "file", "filename", "file_name", "image", "image_path", "filepath")
LABEL_NAMES = ("genre", "genres", "label", "labels", "class", "classes", "tag", "tags")
SPLIT_NAMES = ("split", "subset", "partition")
LABEL_DELIMITERS = ("|", ";", ",")
"""Tried in this order: the first that occurs in any cell separates the labels."""
SPLIT_PARTS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a CSV says, before any picture is looked for."""

    ids: tuple[str, ...]
    files: tuple[str, ...]
    """What names the picture of each row: an id without ending, or a path."""
    rows: tuple[int, ...]
    """The row of each entry in the file; the header is row 1, blank rows count."""
    targets_NC: npt.NDArray[np.uint8]
    class_names: tuple[str, ...]
    given_split: tuple[str, ...] | None
    ignored: tuple[str, ...]
    """Columns that were taken for remarks (titles, years, ...)."""


def read_columns(
    csv: Path,
    *,
    id_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    split_column: str | None = None,
) -> Columns:
    """Read a CSV of labelled pictures; see `core.data.table.read_table` for the layouts and
    arguments.

    Raises:
        InputError: the file cannot be read, is empty, lacks a column, or a cell makes no sense;
            the message names file, row and column.
    """
    frame = _read_csv(csv)
    header = list(frame.columns)
    for name in (id_column, label_column, split_column):
        if name is not None and name not in header:
            raise InputError(
                f"there is no column {name!r}", where=str(csv), hint=f"columns: {_list(header)}"
            )
    path_name = _first_named(header, PATH_NAMES)
    id_name = id_column or _first_named(header, ID_NAMES) or path_name
    if id_name is None:
        raise InputError(
            "no column names the pictures",
            where=str(csv),
            hint=f"call it Id or path, or name it with --id-column; columns: {_list(header)}",
        )
    split_name = split_column or _first_named(header, SPLIT_NAMES)
    rest = [c for c in header if c not in (id_name, path_name, split_name)]
    label_name = label_column or _first_named(rest, LABEL_NAMES)
    flags = [] if label_column else _flag_columns(frame[[c for c in rest if c != label_name]])
    if label_name is None and not flags:
        flags = [c for c in rest if frame[c].nunique() <= 2]  # Perhaps yes/no: refused below.
    if flags:
        class_names = tuple(flags)
        targets_NC = np.stack([_read_flags(csv, frame[c]) for c in flags], axis=1)
    elif label_name is not None:
        class_names, targets_NC = _read_labels(csv, frame[label_name], delimiter)
    else:
        raise InputError(
            "no column holds labels",
            where=str(csv),
            hint="expected one 0/1 column a class, or one column of labels"
            f" (name it with --label-column); columns: {_list(header)}",
        )
    return Columns(
        ids=_filled(csv, frame[id_name]),
        files=_filled(csv, frame[path_name or id_name]),
        rows=tuple(int(row) for row in frame.index),
        targets_NC=targets_NC,
        class_names=class_names,
        given_split=None if split_name is None else _read_split(csv, frame[split_name]),
        ignored=tuple(c for c in rest if c not in class_names and c != label_name),
    )


def _read_csv(csv: Path) -> pd.DataFrame:
    """The cells as text, indexed by row in the file."""
    try:
        with csv.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
        separator = max(",;\t", key=first.count)
        cells = pd.read_csv(
            csv,
            sep=separator,
            header=None,
            index_col=False,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
        )
    except FileNotFoundError as error:
        raise InputError("there is no such CSV file", where=str(csv)) from error
    except UnicodeDecodeError as error:
        problem = f"the text is not UTF-8 (byte {error.start})"
        raise InputError(problem, where=str(csv), hint="save it as CSV UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise InputError("the CSV is empty", where=str(csv)) from error
    except (OSError, pd.errors.ParserError, ValueError) as error:
        raise InputError(f"the CSV cannot be read: {error}", where=str(csv)) from error
    cells.index = cells.index + 1
    blank = (cells == "").all(axis=1)
    cells = cells.loc[~blank]
    if len(cells) < 2:
        raise InputError("the CSV holds no rows", where=str(csv))
    header = [str(name).strip() for name in cells.iloc[0]]
    for name in header:
        if not name:
            column = header.index(name) + 1
            raise InputError(f"column {column} of the header has no name", where=str(csv))
        if header.count(name) > 1:
            raise InputError(f"two columns are called {name!r}", where=str(csv))
    frame = cells.iloc[1:].copy()
    frame.columns = pd.Index(header)
    for name in header:
        frame[name] = frame[name].str.strip()
    return frame


def _first_named(header: Sequence[str], names: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in reversed(header)}
    return next((by_name[name] for name in names if name in by_name), None)


def _flag_columns(frame: pd.DataFrame) -> list[str]:
    """The columns meant as 0/1: some cell is, or (beside such a column) hardly two values occur."""
    values = {str(name): set(column.str.lower()) for name, column in frame.items()}
    if not any(held & _FLAGS.keys() for held in values.values()):
        return []
    return [name for name, held in values.items() if held & _FLAGS.keys() or len(held) <= 2]


def _read_flags(csv: Path, column: pd.Series[str]) -> npt.NDArray[np.uint8]:
    flags = column.str.lower().map(_FLAGS)
    wrong = flags.isna().to_numpy()
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InputError(
            f"row {column.index[at]} holds {column.iloc[at]!r}, which is neither 0 nor 1"
            + (f" (and {wrong.sum() - 1} more rows)" if wrong.sum() > 1 else ""),
            where=f"{csv}, column {column.name!r}",
            hint="a class column holds 0 or 1 in every row; take out columns that are not classes",
        )
    return np.asarray(flags, dtype=np.uint8)


def _read_labels(
    csv: Path, column: pd.Series[str], delimiter: str | None
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    if delimiter is None:
        delimiter = next(
            (d for d in LABEL_DELIMITERS if column.str.contains(d, regex=False).any()), ","
        )
    labels = [_split_cell(csv, column, at, delimiter) for at in range(len(column))]
    class_names = tuple(sorted(set().union(*labels)))
    if not class_names:
        raise InputError("no row has a label", where=f"{csv}, column {column.name!r}")
    index = {name: c for c, name in enumerate(class_names)}
    targets_NC = np.zeros((len(labels), len(class_names)), dtype=np.uint8)
    for at, names in enumerate(labels):
        targets_NC[at, [index[name] for name in names]] = 1
    return class_names, targets_NC


def _split_cell(csv: Path, column: pd.Series[str], at: int, delimiter: str) -> list[str]:
    """The labels of one cell: a Python list of texts as pandas writes it, or delimited text."""
    text = column.iloc[at]
    if not (text.startswith("[") and text.endswith("]")):
        return [part.strip() for part in text.split(delimiter) if part.strip()]
    try:
        parts = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        parts = None
    if not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        raise InputError(
            f"row {column.index[at]} holds {text!r}, which is not a list of texts",
            where=f"{csv}, column {column.name!r}",
            hint="expected for example ['Drama', 'Romance'] or Drama|Romance",
        )
    return [part.strip() for part in parts if part.strip()]


def _read_split(csv: Path, column: pd.Series[str]) -> tuple[str, ...]:
    for row, value in column.items():
        if value.lower() not in SPLIT_PARTS:
            raise InputError(
                f"row {row} holds {value!r}",
                where=f"{csv}, column {column.name!r}",
                hint="expected train, validation or test",
            )
    return tuple(SPLIT_PARTS[value.lower()] for value in column)


def _filled(csv: Path, column: pd.Series[str]) -> tuple[str, ...]:
    for row, value in column.items():
        if not value or "\0" in value:
            problem = f"row {row} holds {value!r}, which names no picture"
            raise InputError(problem, where=f"{csv}, column {column.name!r}")
    return tuple(column)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:40])
    return shown if len(names) <= 40 else f"{shown}, ... ({len(names)} in all)"
