"""What a person wants to know of a table before training on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .duplicates import find_groups
from .table import Table


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """Counts over a table. All are of rows unless said otherwise."""

    name: str
    num_images: int
    num_classes: int
    num_labels: int
    """Ones in the targets."""
    cardinality: float
    """Labels a row, on average."""
    label_counts: dict[str, int]
    """Rows with each class' label, in class order."""
    num_without_label: int
    repeated_ids: dict[str, int]
    """Ids that more than one row has, with the number of their rows."""
    duplicate_groups: tuple[tuple[str, ...], ...]
    """Different ids with equal or nearly equal pictures: the distinct ids of each such group."""
    given_split_counts: dict[str, int] | None
    """Rows of each part, if the CSV names a split."""
    groups_across_given_split: tuple[tuple[str, ...], ...]
    """Of the groups above and the repeated ids, those on more than one side of the given split."""
    ignored_columns: tuple[str, ...]

    @property
    def classes_without_picture(self) -> tuple[str, ...]:
        """Classes that no row has: a table with any cannot be split."""
        return tuple(name for name, count in self.label_counts.items() if count == 0)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {**asdict(self), "classes_without_picture": list(self.classes_without_picture)}


def describe(table: Table, *, groups: npt.NDArray[np.int64] | None = None) -> TableReport:
    """Count what is in a table.

    Args:
        table: its pictures must be readable, unless `groups` is given.
        groups: what `core.data.duplicates.find_groups` returned for it; None to find them now.
    """
    found = find_groups(table) if groups is None else groups
    members: dict[int, list[int]] = {}
    for row, group in enumerate(found):
        members.setdefault(int(group), []).append(row)
    distinct = {
        group: tuple(dict.fromkeys(table.ids[r] for r in rows)) for group, rows in members.items()
    }
    split = table.given_split
    across = [
        distinct[group]
        for group, rows in members.items()
        if split is not None and len({split[row] for row in rows}) > 1
    ]
    num_labels = int(table.targets_NC.sum(dtype=np.int64))
    counts_C = table.targets_NC.sum(axis=0, dtype=np.int64)
    return TableReport(
        name=table.name,
        num_images=table.num_images,
        num_classes=table.num_classes,
        num_labels=num_labels,
        cardinality=num_labels / table.num_images,
        label_counts={n: int(c) for n, c in zip(table.class_names, counts_C, strict=True)},
        num_without_label=int((table.targets_NC.sum(axis=1) == 0).sum()),
        repeated_ids={name: count for name, count in Counter(table.ids).items() if count > 1},
        duplicate_groups=tuple(ids for ids in distinct.values() if len(ids) > 1),
        given_split_counts=None if split is None else dict(Counter(split)),
        groups_across_given_split=tuple(across),
        ignored_columns=table.ignored_columns,
    )
