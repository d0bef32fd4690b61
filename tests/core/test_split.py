"""Splits: complete, deterministic, stratified, leak-proof, and refused when they cannot be good."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.data.split import Split, make_split
from core.data.stratify import stratify
from core.data.table import Table, read_table
from core.errors import InputError

PARTS = ("train", "validation", "test")


def _table(
    targets_NC: npt.ArrayLike, ids: list[str] | None = None, split: list[str] | None = None
) -> Table:
    targets = np.asarray(targets_NC, dtype=np.uint8)
    names = ids or [f"tt{row:04}" for row in range(len(targets))]
    return Table(
        name="t",
        root=Path("/nowhere"),
        ids=tuple(names),
        paths=tuple(Path(f"/nowhere/{name}.jpg") for name in names),
        targets_NC=targets,
        class_names=tuple("ABCDEFGHIJ"[: targets.shape[1]]),
        given_split=None if split is None else tuple(split),
    )


def _random_table(num_images: int = 400, seed: int = 0) -> Table:
    """Eight classes from very common to rare (4 positives), 0 to 5 labels a row."""
    rng = np.random.default_rng(seed)
    shares = np.array([0.5, 0.4, 0.2, 0.1, 0.05, 0.03, 0.02, 0.0])
    targets = (rng.random((num_images, 8)) < shares).astype(np.uint8)
    targets[rng.choice(num_images, 4, replace=False), 7] = 1
    return _table(targets)


def _alone(table: Table) -> npt.NDArray[np.int64]:
    return np.arange(table.num_images)


def _assert_partition(arrays: list[npt.NDArray[np.int64]], num_rows: int) -> None:
    for array in arrays:
        assert array.dtype == np.int64
        assert (np.diff(array) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate(arrays)), np.arange(num_rows))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_are_complete_stratified_and_of_the_right_size(seed: int) -> None:
    table = _random_table()
    split = make_split(table, seed=seed, groups=_alone(table))
    parts = [split.train, split.validation, split.test]
    _assert_partition(parts, 400)
    for rows, share in zip(parts, (0.7225, 0.1275, 0.15), strict=True):
        assert abs(len(rows) - share * 400) <= 5
        counts = table.targets_NC[rows].sum(axis=0)
        assert np.abs(counts - share * table.targets_NC.sum(axis=0)).max() <= 2.5
        assert counts.min() >= 1
    assert split.pairs()[0][0] is split.train
    assert split.pairs()[0][1] is split.validation
    assert len(split.pairs()) == 1


def test_stratification_is_better_than_chance() -> None:
    table = _random_table()
    split = make_split(table, groups=_alone(table))
    wanted = table.targets_NC.sum(axis=0) * 0.15

    def error(rows: npt.NDArray[np.int64]) -> float:
        return float(np.abs(table.targets_NC[rows].sum(axis=0) - wanted).mean())

    rng = np.random.default_rng(0)
    by_chance = [error(rng.choice(400, 60, replace=False)) for _ in range(200)]
    assert error(split.test) < min(by_chance)


def test_parts_are_alike_in_labels_a_row() -> None:
    table = _random_table()
    split = make_split(table, groups=_alone(table))
    means = [table.targets_NC[getattr(split, part)].sum(axis=1).mean() for part in PARTS]
    assert max(means) - min(means) < 0.1


def test_the_seed_decides() -> None:
    table = _random_table()
    splits = [make_split(table, seed=seed, groups=_alone(table)) for seed in (0, 0, 1)]
    for part in PARTS:
        np.testing.assert_array_equal(getattr(splits[0], part), getattr(splits[1], part))
    assert not np.array_equal(splits[0].test, splits[2].test)


def test_the_very_rows_are_known() -> None:
    # So that a platform or a library version that differs is noticed. No random numbers here.
    targets = [[row * (7 + 4 * c) % 23 < 9 - 2 * c for c in range(4)] for row in range(200)]
    split = make_split(_table(targets), groups=range(200))
    rows = np.concatenate([split.train, split.validation, split.test])
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == "6de1c603338e144b"


def test_the_order_of_rows_does_not_matter() -> None:
    table = _random_table()
    order = np.random.default_rng(3).permutation(400)
    split = make_split(table, groups=_alone(table))
    shuffled = make_split(table.select(order), groups=_alone(table))
    for part in PARTS:
        assert set(order[getattr(shuffled, part)]) == set(getattr(split, part))


def test_the_test_part_does_not_depend_on_validation() -> None:
    table = _random_table()
    splits = [
        make_split(table, groups=_alone(table)),
        make_split(table, groups=_alone(table), validation_fraction=0.4),
        make_split(table, groups=_alone(table), num_folds=4),
    ]
    for split in splits[1:]:
        np.testing.assert_array_equal(split.test, splits[0].test)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_groups_and_equal_ids_are_never_torn(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(40, 80))
    seed = data.draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_rows, 3)) < 0.5).astype(np.uint8)
    groups = rng.integers(0, num_rows, num_rows)
    ids = [f"id{n}" for n in range(num_rows)]
    ids[3], ids[9], ids[20] = ids[30], ids[30], ids[21]
    num_folds = data.draw(st.sampled_from([None, 2, 3]))
    split = make_split(_table(targets, ids), seed=seed, groups=groups, num_folds=num_folds)
    _assert_partition([split.train, split.validation, split.test], num_rows)
    for train, validation in split.pairs():
        sides = np.empty(num_rows, dtype=int)
        sides[train], sides[validation], sides[split.test] = 0, 1, 2
        for keys in (groups.tolist(), ids):
            for key in set(keys):
                assert len({sides[row] for row, other in enumerate(keys) if other == key}) == 1


def test_folds_partition_the_rest_and_each_is_stratified() -> None:
    table = _random_table()
    split = make_split(table, num_folds=4, groups=_alone(table))
    _assert_partition([*split.folds, split.test], 400)
    np.testing.assert_array_equal(split.validation, split.folds[0])
    assert len(split.pairs()) == 4
    rest = table.targets_NC[np.concatenate(split.folds)].sum(axis=0)
    for (train, validation), fold in zip(split.pairs(), split.folds, strict=True):
        assert validation is fold
        _assert_partition([train, validation, split.test], 400)
        assert np.abs(table.targets_NC[fold].sum(axis=0) - rest / 4).max() <= 2
        assert table.targets_NC[train].any(axis=0).all()


@pytest.mark.parametrize("seed", range(10))
def test_rare_classes_reach_the_parts_in_order_of_need(seed: int) -> None:
    targets = np.zeros((300, 4), dtype=np.uint8)
    targets[:, 0] = 1
    targets[:2, 1] = 1  # Two pictures: train and test.
    targets[10:13, 2] = 1  # Three: every part.
    targets[[0, 20, 21, 22], 3] = 1  # Four, one of them shared with the rarest.
    table = _table(targets)
    split = make_split(table, seed=seed, groups=_alone(table))
    counts = {part: targets[getattr(split, part)].sum(axis=0).tolist() for part in PARTS}
    assert [counts[part][1] for part in PARTS] == [1, 0, 1]
    assert [counts[part][2] for part in PARTS] == [1, 1, 1]
    assert min(counts[part][3] for part in PARTS) >= 1
    folds = make_split(table, seed=seed, groups=_alone(table), num_folds=5)
    # The one picture left for training is in no fold, and so in every training part.
    pinned = np.setdiff1d(folds.train, np.concatenate(folds.folds))
    assert len(pinned) == 1
    for train, _ in folds.pairs():
        assert targets[train].any(axis=0).all()


def test_classes_with_too_few_different_pictures_are_all_named() -> None:
    targets = np.zeros((50, 4), dtype=np.uint8)
    targets[:, 0] = 1
    targets[7, 1] = 1
    targets[:2, 3] = 1
    groups = np.arange(50)
    groups[1] = 0  # The two pictures of D are one and the same.
    with pytest.raises(InputError, match=r"fewer than 2 different .*: B \(1\), C \(0\), D \(1\)"):
        make_split(_table(targets), groups=groups)


def test_a_given_split_is_kept() -> None:
    given = ["train", "validation", "test"] * 10
    table = _table(np.ones((30, 2)), split=given)
    split = make_split(table, groups=_alone(table))
    assert split.seed is None
    for part in PARTS:
        assert getattr(split, part).tolist() == [r for r in range(30) if given[r] == part]


@pytest.mark.parametrize("lacking", ["validation", "test"])
def test_a_part_that_a_given_split_lacks_is_cut_from_train(lacking: str) -> None:
    other = "test" if lacking == "validation" else "validation"
    given = [other] * 20 + ["train"] * 100
    table = _table(np.ones((120, 2)), split=given)
    split = make_split(table, groups=_alone(table), seed=5)
    assert split.seed == 5
    assert getattr(split, other).tolist() == list(range(20))
    assert len(getattr(split, lacking)) == 15
    _assert_partition([split.train, split.validation, split.test], 120)


def test_folds_over_a_given_split_use_train_and_validation() -> None:
    given = ["test"] * 20 + ["train"] * 60 + ["validation"] * 20
    split = make_split(_table(np.ones((100, 1)), split=given), groups=range(100), num_folds=4)
    assert split.test.tolist() == list(range(20))
    assert [len(fold) for fold in split.folds] == [20, 20, 20, 20]


def test_bad_given_splits() -> None:
    targets = np.ones((6, 2), dtype=np.uint8)
    targets[4:, 1] = 0
    given = ["train", "train", "validation", "validation", "test", "test"]
    with pytest.raises(InputError, match=r"class 'B' has no picture in test \(4 different"):
        make_split(_table(targets, split=given), groups=range(6))
    with pytest.raises(InputError, match="id 'x' is in both train and test"):
        ids = ["x", "b", "c", "d", "e", "x"]
        make_split(_table(np.ones((6, 2)), ids=ids, split=given), groups=range(6))
    with pytest.raises(InputError, match="no row is left for train"):
        make_split(_table(np.ones((2, 1)), split=["validation", "test"]), groups=range(2))


def test_tables_that_are_too_small() -> None:
    with pytest.raises(InputError, match=r"no row is left for validation \(2 rows in all"):
        make_split(_table(np.ones((2, 1))), groups=range(2))
    split = make_split(_table(np.ones((3, 1))), groups=range(3))
    assert [len(getattr(split, part)) for part in PARTS] == [1, 1, 1]
    with pytest.raises(InputError, match="no row is left for fold"):
        make_split(_table(np.ones((4, 1))), groups=range(4), num_folds=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_fraction": 0.0}, "0 < test_fraction < 1 must hold, but got 0.0"),
        ({"validation_fraction": 1.0}, "0 < validation_fraction < 1 must hold, but got 1.0"),
        ({"num_folds": 1}, "num_folds >= 2 must hold, but got 1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_split(_table(np.ones((9, 1))), groups=range(9), **arguments)  # type: ignore[arg-type]


def test_groups_must_match_the_rows() -> None:
    with pytest.raises(ValueError, match="9 groups are needed, one a row, got 8"):
        make_split(_table(np.ones((9, 1))), groups=range(8))


@pytest.mark.parametrize("num_folds", [None, 3])
def test_save_and_load(num_folds: int | None, tmp_path: Path) -> None:
    table = _random_table()
    split = make_split(table, seed=4, groups=_alone(table), num_folds=num_folds)
    path = tmp_path / "split.json"
    split.save(path)
    split.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]
    again = Split.load(path, table)
    assert again.seed == 4
    assert again.ids == table.ids
    for part in PARTS:
        np.testing.assert_array_equal(getattr(again, part), getattr(split, part))
        assert getattr(again, part).dtype == np.int64
    assert [f.tolist() for f in again.folds] == [f.tolist() for f in split.folds]


def test_load_refuses_another_table_and_damaged_files(tmp_path: Path) -> None:
    table = _table(np.ones((60, 2)))
    path = tmp_path / "split.json"
    make_split(table, groups=_alone(table)).save(path)
    with pytest.raises(InputError, match=r"split\.json: .*60 then, 59 now; 1 ids gone, 0 new"):
        Split.load(path, table.select(range(59)))
    with pytest.raises(InputError, match="their order differs"):
        Split.load(path, table.select(range(59, -1, -1)))
    with pytest.raises(InputError, match="no such split file"):
        Split.load(tmp_path / "gone.json", table)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        Split.load(path, table)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="not a split that this version can read"):
        Split.load(path, table)


def test_an_unwritable_folder(tmp_path: Path) -> None:
    split = make_split(_table(np.ones((9, 1))), groups=range(9))
    with pytest.raises(InputError, match="the split cannot be written"):
        split.save(tmp_path / "missing" / "split.json")


def test_stratify_deals_out_every_group_by_weight() -> None:
    rng = np.random.default_rng(0)
    labels_GC = rng.integers(0, 3, (200, 5))
    balance_GK = rng.integers(1, 4, (200, 1))
    part_G = stratify(labels_GC, balance_GK, [0.6, 0.3, 0.1], [1, 1, 1])
    for part, share in enumerate((0.6, 0.3, 0.1)):
        counts_C = labels_GC[part_G == part].sum(axis=0)
        np.testing.assert_allclose(counts_C, share * labels_GC.sum(axis=0), atol=6)
        size = balance_GK[part_G == part].sum()
        np.testing.assert_allclose(size, share * balance_GK.sum(), atol=0.1 * balance_GK.sum())


@pytest.mark.posters
def test_the_real_posters(posters_dir: Path) -> None:
    table = read_table(posters_dir)
    split = make_split(table)
    _assert_partition([split.train, split.validation, split.test], table.num_images)
    counts = table.targets_NC.sum(axis=0)
    for part, share in zip(PARTS, (0.7225, 0.1275, 0.15), strict=True):
        held = table.targets_NC[getattr(split, part)].sum(axis=0)
        assert np.abs(held - share * counts).max() <= 2
        assert abs(len(getattr(split, part)) / table.num_images - share) < 0.005
        # Reality-TV has two posters: one to learn from, one to be judged by.
        absent = [n for n, c in zip(table.class_names, held, strict=True) if c == 0]
        assert absent == (["Reality-TV"] if part == "validation" else [])
