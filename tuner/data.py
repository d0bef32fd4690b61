"""A person's data before a study: read, every picture checked, duplicates found, split.

Damaged pictures are refused before anything is trained, with a list; with `skip_bad` they are
left out and counted. Progress goes to a callable: (what, done, total).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.data.duplicates import find_groups
from core.data.table import Table, read_table
from core.errors import InputError
from core.images.pictures import PictureProblem, check_pictures

SHOWN_PROBLEMS = 5
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class CheckedData:
    """A table whose pictures can all be read."""

    table: Table
    problems: tuple[PictureProblem, ...]
    """Pictures that were left out."""
    groups: npt.NDArray[np.int64]
    """Which rows show the same picture: one number a row."""


def check_data(
    table: Table, *, skip_bad: bool, progress: Progress = lambda *_: None
) -> CheckedData:
    """Decode every picture of a table and look for duplicates.

    Raises InputError for damaged or missing pictures, unless `skip_bad`.
    """
    problems = check_pictures(
        table.paths, progress=lambda done, total: progress("checking pictures", done, total)
    )
    if problems and not skip_bad:
        shown = "\n".join(f"    {p.path}: {p.reason}" for p in problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        raise InputError(
            f"{len(problems)} of {table.num_images} pictures cannot be used:\n{shown}"
            + (f"\n    and {more} more" if more > 0 else ""),
            where=str(table.root),
            hint="mend them, or leave them out with --skip-bad-images",
        )
    bad = {problem.row for problem in problems}
    table = without_rows(table, bad)
    groups = find_groups(
        table, progress=lambda done, total: progress("looking for duplicates", done, total)
    )
    return CheckedData(table=table, problems=tuple(problems), groups=groups)


def reread_table(arguments: dict[str, Any], *, skipped: Collection[str], fingerprint: str) -> Table:
    """The table of an existing study, without the pictures that it left out.

    Raises InputError if it is another table by now.
    """
    table = read_table(**arguments, allow_missing=True)
    names = set(skipped)
    bad = {r for r, path in enumerate(table.paths) if name_in(table, path) in names}
    table = without_rows(table, bad)
    if table.fingerprint() != fingerprint:
        raise InputError(
            "the data changed since the study began",
            where=str(table.root),
            hint="bring them back as they were, or start a new study",
        )
    return table


def name_in(table: Table, path: Path) -> str:
    """A picture's path from the data folder, the same wherever that folder is."""
    return Path(os.path.relpath(path, table.root)).as_posix()


def without_rows(table: Table, rows: Collection[int]) -> Table:
    """The table without some rows."""
    if not rows:
        return table
    kept = [row for row in range(table.num_images) if row not in rows]
    if len(kept) < table.num_classes:
        raise InputError(
            f"{len(kept)} usable pictures are left for {table.num_classes} classes",
            where=str(table.root),
            hint="a study needs at least as many pictures as classes",
        )
    return table.select(kept)
