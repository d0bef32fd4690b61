"""Which rows are trained on, validated on and tested on; deterministic from a seed.

Labels are spread by iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011), with groups of
rows that show the same picture in the place of single rows. The test part is cut first, so that it
does not depend on how the rest is validated. The order of groups comes from hashes of seed and id:
no random number generator, so that it is the same on every platform and in every version.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .duplicates import find_groups, join_rows
from .stratify import stratify
from .table import Table

IntArray = npt.NDArray[np.int64]

_FORMAT = 1
_MOST_LABELS = 8
"""Pictures with more labels than this count as having this many when parts are made alike."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Row numbers of a table, each array sorted; the parts share no row and cover the table."""

    seed: int | None
    """What it was made from; None if the table gave every part."""
    train: IntArray
    validation: IntArray
    test: IntArray
    folds: tuple[IntArray, ...] = ()
    """For k-fold validation: disjoint parts of train and validation; `validation` is the first. A
    row of `train` in no fold is a class' only picture there, and trained on every time."""
    ids: tuple[str, ...] = ()
    """The ids of the table's rows, by which `load` knows it again."""

    def pairs(self) -> list[tuple[IntArray, IntArray]]:
        """(train rows, validation rows) of each fold, or of the one hold-out pair."""
        if not self.folds:
            return [(self.train, self.validation)]
        rest = np.union1d(self.train, self.validation)
        return [(np.setdiff1d(rest, fold), fold) for fold in self.folds]

    def save(self, path: Path) -> None:
        """Write it as JSON, all or nothing.

        Raises:
            InputError: the file cannot be written.
        """
        values = {
            "format": _FORMAT,
            "seed": self.seed,
            "ids": self.ids,
            **{part: getattr(self, part).tolist() for part in ("train", "validation", "test")},
            "folds": [fold.tolist() for fold in self.folds],
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(values), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"the split cannot be written ({error})", where=str(path)) from error

    @classmethod
    def load(cls, path: Path, table: Table) -> Split:
        """Read what `save` wrote, for the same table.

        Raises:
            InputError: the file is missing or damaged, or the table's rows are others by now.
        """
        values = _read(path)
        before, now = values["ids"], list(table.ids)
        if before != now:
            lost, new = len(set(before) - set(now)), len(set(now) - set(before))
            raise InputError(
                f"it was made for other rows: {len(before)} then, {len(now)} now; "
                + (f"{lost} ids gone, {new} new" if lost or new else "their order differs"),
                where=str(path),
                hint="use the data as they were, or start a new study",
            )
        return cls(
            seed=values["seed"],
            ids=tuple(before),
            train=_rows(values["train"]),
            validation=_rows(values["validation"]),
            test=_rows(values["test"]),
            folds=tuple(_rows(fold) for fold in values["folds"]),
        )


def make_split(
    table: Table,
    *,
    seed: int = 0,
    test_fraction: float = 0.15,
    validation_fraction: float = 0.15,
    num_folds: int | None = None,
    groups: Sequence[int] | npt.NDArray[np.int64] | None = None,
) -> Split:
    """Split a table: test rows first, then the rest into train and validation, or into folds.

    Every class gets a picture in train and in test, and in validation if it has a third. A split
    given in the table is kept; the parts it lacks are cut from its train rows.

    Args:
        table: the rows to split.
        seed: another seed is another split.
        test_fraction: share of all rows, 0 < f < 1.
        validation_fraction: share of the rows that are not test, 0 < f < 1; not read with folds.
        num_folds: None for one validation part; else at least 2 folds over train and validation.
        groups: a number for each row, equal for rows that must stay together; None to find them
            (`core.data.duplicates.find_groups`, which decodes every picture). Rows with equal ids
            stay together anyhow.

    Raises:
        InputError: a class has too few different pictures for train and test, a given split lacks
            one there or has an id on two sides, or an argument is out of its range.
    """
    _check_arguments(test_fraction, validation_fraction, num_folds)
    found = find_groups(table) if groups is None else groups
    if len(found) != table.num_images:
        raise ValueError(f"{table.num_images} groups are needed, one a row, got {len(found)}")
    group_N = join_rows([[int(group) for group in found], table.ids])
    part_N = np.array(table.given_split or ["train"] * table.num_images, dtype="<U10")
    given = set(part_N.tolist()) if table.given_split else {"train"}
    if table.given_split is None:
        _check_classes(table, group_N)
    if "test" not in given:
        rows = _rows(np.flatnonzero(part_N == "train"))
        cut = _cut(table, group_N, rows, seed, [1 - test_fraction, test_fraction], [2, 1])
        part_N[rows[cut == 1]] = "test"
    folds: tuple[IntArray, ...] = ()
    if num_folds is not None:
        rows = _rows(np.flatnonzero(part_N != "test"))
        free = rows[~_only_example(table, group_N, rows)]
        cut = _cut(table, group_N, free, seed, [1 / num_folds] * num_folds, [1] * num_folds)
        folds = tuple(free[cut == fold] for fold in range(num_folds))
        part_N[rows] = "train"
        part_N[folds[0]] = "validation"
    elif "validation" not in given:
        rows = _rows(np.flatnonzero(part_N == "train"))
        free = rows[~_only_example(table, group_N, rows)]
        shares = [1 - validation_fraction, validation_fraction]
        part_N[free[_cut(table, group_N, free, seed, shares, [1, 1]) == 1]] = "validation"
    all_given = num_folds is None and {"train", "validation", "test"} <= given
    split = Split(
        seed=None if all_given else seed,
        train=_rows(np.flatnonzero(part_N == "train")),
        validation=_rows(np.flatnonzero(part_N == "validation")),
        test=_rows(np.flatnonzero(part_N == "test")),
        folds=folds,
        ids=table.ids,
    )
    _check_split(table, group_N, split)
    return split


def _cut(
    table: Table,
    group_N: IntArray,
    rows: IntArray,
    seed: int,
    fractions: Sequence[float],
    minimum: Sequence[int],
) -> IntArray:
    """The part of each of `rows`, numbered as `fractions` are."""
    first_id: dict[int, str] = {}
    for row in rows:
        group, name = int(group_N[row]), table.ids[row]
        first_id[group] = min(first_id.get(group, name), name)
    # A group is known by its least id, so that the order of rows in the CSV does not matter.
    order = sorted(first_id, key=lambda group: _digest(seed, first_id[group]))
    place = {group: at for at, group in enumerate(order)}
    at_R = np.array([place[int(group_N[row])] for row in rows], dtype=np.int64)
    labels_GC = np.zeros((len(order), table.num_classes), dtype=np.int64)
    np.add.at(labels_GC, at_R, table.targets_NC[rows].astype(np.int64))
    # The number of labels a picture has decides how easy it is, so parts are to be alike in that.
    num_labels_R = np.minimum(table.targets_NC[rows].sum(axis=1, dtype=np.int64), _MOST_LABELS)
    balance_GK = np.zeros((len(order), _MOST_LABELS + 1), dtype=np.int64)
    np.add.at(balance_GK, (at_R, num_labels_R), 1)
    return stratify(labels_GC, balance_GK, fractions, minimum)[at_R]


def _only_example(table: Table, group_N: IntArray, rows: IntArray) -> npt.NDArray[np.bool_]:
    """Which of `rows` belong to a group that alone among them has a class: it has to be trained
    on, as a class that was never seen cannot be learnt."""
    num_C = _num_groups(table, group_N, rows)
    single = table.targets_NC[np.ix_(rows, np.flatnonzero(num_C == 1))].any(axis=1)
    return np.isin(group_N[rows], group_N[rows[single]])


def _num_groups(table: Table, group_N: IntArray, rows: IntArray) -> IntArray:
    """How many groups among `rows` have each class, [C]."""
    labelled = [group_N[rows[table.targets_NC[rows, c] > 0]] for c in range(table.num_classes)]
    return np.array([len(np.unique(groups)) for groups in labelled], dtype=np.int64)


def _digest(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()


def _rows(values: Any) -> IntArray:
    return np.asarray(values, dtype=np.int64)


def _check_arguments(test: float, validation: float, num_folds: int | None) -> None:
    for name, fraction in (("test_fraction", test), ("validation_fraction", validation)):
        if not 0 < fraction < 1:
            raise InputError(f"0 < {name} < 1 must hold, but got {fraction}", where=name)
    if num_folds is not None and num_folds < 2:
        raise InputError(f"num_folds >= 2 must hold, but got {num_folds}", where="num_folds")


def _check_classes(table: Table, group_N: IntArray) -> None:
    """Each class needs a picture to learn from and another one to be judged by."""
    num_C = _num_groups(table, group_N, np.arange(table.num_images))
    scarce = [f"{n} ({c})" for n, c in zip(table.class_names, num_C, strict=True) if c < 2]
    if scarce:
        raise InputError(
            f"classes with fewer than 2 different pictures cannot be split: {', '.join(scarce)}",
            where=str(table.root),
            hint="add pictures of them, or take these classes out of the CSV",
        )


def _check_split(table: Table, group_N: IntArray, split: Split) -> None:
    given = table.given_split
    if given is not None:
        sides: dict[str, str] = {}
        for name, side in zip(table.ids, given, strict=True):
            if sides.setdefault(name, side) != side:
                problem = f"id {name!r} is in both {sides[name]} and {side} of the given split"
                raise InputError(problem, where=str(table.root), hint="give it one side")
    pairs = split.pairs()
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    parts |= {f"fold {k}": fold for k, (_, fold) in enumerate(pairs, 1) if split.folds}
    empty = [name for name, rows in parts.items() if len(rows) == 0]
    if empty:
        problem = f"no row is left for {', '.join(empty)} ({table.num_images} rows in all)"
        raise InputError(problem, where=str(table.root), hint="add pictures, or use fewer folds")
    num_C = _num_groups(table, group_N, np.arange(table.num_images))
    needed = {"test": split.test}
    needed |= {f"train (fold {k})": train for k, (train, _) in enumerate(pairs, 1)}
    for name, rows in needed.items() if split.folds else parts.items():
        for index, present in enumerate(np.any(table.targets_NC[rows], axis=0).tolist()):
            # With 2 pictures a class is in train and test; it is judged in test alone.
            if not present and (name != "validation" or num_C[index] > 2):
                raise InputError(
                    f"class {table.class_names[index]!r} has no picture in {name}"
                    f" ({num_C[index]} different ones in all)",
                    where=str(table.root),
                    hint="move one there" if given else "add pictures, or try another seed",
                )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("there is no such split file", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"the split cannot be read ({error})", where=str(path)) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise InputError("this is not a split that this version can read", where=str(path))
    return values
