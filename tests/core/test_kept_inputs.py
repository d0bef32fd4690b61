"""What a process keeps scaled between cohorts, and what it must not."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import TrialConfig
from core.encoding.inputs import FloatMatrix, HeadInputs
from core.probing.group import Source
from core.probing.kept_inputs import CohortInputs, KeptInputs
from core.probing.probe import train_mixed_probes

ROWS = 60
TRAIN = np.arange(40)


@pytest.fixture
def matrices(tmp_path: Path) -> list[FloatMatrix]:
    """Three, of unlike values, as workers open them."""
    found = []
    for number in range(3):
        file = tmp_path / f"{number}.npy"
        np.save(file, np.random.default_rng(number).normal(size=(ROWS, 5)).astype(np.float32))
        found.append(np.lib.format.open_memmap(file, mode="r"))
    return found


def source_of(matrix: FloatMatrix, **views: FloatMatrix) -> Source:
    return Source(features=matrix, further_views=views)


def scaled(inputs: CohortInputs, place: int = 0, rows: np.ndarray = TRAIN) -> HeadInputs:
    return inputs.of(place, norm="standardize", train_rows=rows)


def reopened(matrix: FloatMatrix) -> FloatMatrix:
    assert isinstance(matrix, np.memmap) and matrix.filename is not None
    return np.lib.format.open_memmap(matrix.filename, mode="r")


def test_the_same_files_are_scaled_once(matrices: list[FloatMatrix]) -> None:
    kept = KeptInputs()
    first, second, _ = matrices
    before = kept.of_cohort([source_of(first), source_of(second)], "cpu")
    inputs = scaled(before), scaled(before, 1)
    # In another order, opened again, as the next cohort has it.
    after = kept.of_cohort([source_of(reopened(second)), source_of(reopened(first))], "cpu")
    assert (scaled(after, 1), scaled(after)) == inputs
    assert scaled(after) is scaled(after)


def test_what_differs_is_scaled_anew(matrices: list[FloatMatrix]) -> None:
    kept = KeptInputs()
    first, second, third = matrices
    plain = scaled(kept.of_cohort([source_of(first)], "cpu"))
    again = kept.of_cohort([source_of(first)], "cpu")
    others = [
        scaled(again, rows=np.arange(30)),
        again.of(0, norm="none", train_rows=TRAIN),
        scaled(kept.of_cohort([source_of(first, flip=second)], "cpu")),
        scaled(kept.of_cohort([source_of(first, flip=third)], "cpu")),
        scaled(kept.of_cohort([source_of(second)], "cpu")),
        scaled(kept.of_cohort([source_of(first)], "meta")),
    ]
    assert len({id(inputs) for inputs in [plain, *others]}) == 1 + len(others)


def test_what_a_cohort_does_not_read_leaves_the_memory(matrices: list[FloatMatrix]) -> None:
    kept = KeptInputs()
    first, second, _ = matrices
    inputs = kept.of_cohort([source_of(first), source_of(second)], "cpu")
    gone, stays = weakref.ref(scaled(inputs)), weakref.ref(scaled(inputs, 1))
    inputs = kept.of_cohort([source_of(second)], "cpu")
    gc.collect()
    assert gone() is None
    assert stays() is scaled(inputs)


def test_numbers_that_are_no_file_may_change(matrices: list[FloatMatrix]) -> None:
    kept = KeptInputs()
    values = np.array(matrices[0])
    before = kept.of_cohort([source_of(values)], "cpu")
    assert scaled(before) is scaled(before), "all groups of a cohort share them"
    values *= -1
    after = kept.of_cohort([source_of(values)], "cpu")
    old, new = (scaled(inputs).batch(np.arange(ROWS)) for inputs in (before, after))
    torch.testing.assert_close(new, -old)
    part = matrices[0][:50]  # Of a file, and not all of it.
    assert scaled(kept.of_cohort([source_of(part)], "cpu")) is not scaled(
        kept.of_cohort([source_of(part)], "cpu")
    )


def test_a_cohort_that_goes_on_beside_the_next_keeps_its_own(matrices: list[FloatMatrix]) -> None:
    """A worker's thread may outlive its trial for a moment."""
    kept = KeptInputs()
    first, second, _ = matrices
    old = kept.of_cohort([source_of(first)], "cpu")
    kept.of_cohort([source_of(second)], "cpu")
    expected = HeadInputs(first, norm="standardize", train_rows=TRAIN, device="cpu")
    assert torch.equal(scaled(old).batch(TRAIN), expected.batch(TRAIN))


def test_heads_come_to_the_same_with_what_was_kept(
    matrices: list[FloatMatrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets_NC = torch.from_numpy(np.random.default_rng(9).random((ROWS, 4)) < 0.4).float()
    folds = [(TRAIN, np.arange(40, ROWS))]
    configs = [
        TrialConfig.from_dict({"backbone": "resnet18", "lr": lr, "epochs": 3, "batch_size": 8})
        for lr in (0.1, 0.01, 0.001)
    ]
    made = []
    build = HeadInputs.__init__

    def counted(self: HeadInputs, *args: object, **options: object) -> None:
        made.append(self)
        build(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HeadInputs, "__init__", counted)
    kept = KeptInputs()
    runs = []
    for matrix in (matrices[0], reopened(matrices[0]), np.array(matrices[0])):
        sources, places = [source_of(matrix)], [0] * len(configs)
        outcomes = train_mixed_probes(sources, places, targets_NC, folds, configs, kept=kept)
        runs.append([outcome.curve for outcome in outcomes])
    assert runs[0] == runs[1] == runs[2]
    assert len(made) == 2
