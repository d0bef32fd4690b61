"""Heads cut into stacks for the threads of a CPU, and trained in lower precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import TrialConfig
from core.precision import BFLOAT16
from core.probing import group, probe
from core.probing.fold import Task
from core.probing.probe import train_probes
from core.report import Outcome, Status

N, D, C = 240, 16, 6
HOLD_OUT = [(np.arange(160, dtype=np.int64), np.arange(160, N, dtype=np.int64))]


def _data() -> tuple[np.ndarray, Tensor]:
    rng = np.random.default_rng(0)
    targets = (rng.random((N, C)) < [0.6, 0.5, 0.4, 0.3, 0.3, 0.2]).astype(np.float32)
    features = targets @ rng.normal(0, 1, (C, D)) + rng.normal(0, 1.5, (N, D))
    return features.astype(np.float32), torch.from_numpy(targets)


def _train(configs: list[TrialConfig], **settings: Any) -> list[Outcome]:
    features, targets_NC = _data()
    return train_probes(features, targets_NC, HOLD_OUT, configs, **settings)


def _heads(count: int) -> list[TrialConfig]:
    """Every optimizer, linear heads and MLPs with dropout."""
    return [
        TrialConfig(
            backbone="ffn",
            epochs=3 + place % 3,
            batch_size=40,
            lr=0.02,
            seed=place,
            optimizer=("sgd", "adam", "adamw", "rmsprop")[place % 4],
            loss=("bce", "cross_entropy", "focal", "asymmetric")[place // 4 % 4],
            **({"head": "mlp", "hidden_sizes": (9,), "dropout": 0.3} if place % 2 else {}),
        )
        for place in range(count)
    ]


def _alone(configs: list[TrialConfig], monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """The same heads in one stack of each shape."""
    with monkeypatch.context() as patch:
        patch.setattr(probe, "SLACK", len(configs))
        return _train(configs)


def test_parts_in_threads_train_what_one_stack_trains(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = _heads(40)[1::2]
    whole = _alone(configs, monkeypatch)
    stacks: list[int] = []
    build = group.HeadStack

    def counting(parts: list[TrialConfig], **settings: Any) -> Any:
        stacks.append(len(parts))
        return build(parts, **settings)

    monkeypatch.setattr(group, "HeadStack", counting)
    parts = _train(configs)
    assert stacks == [10, 10]
    for part, one in zip(parts, whole, strict=True):
        assert part.status is one.status is Status.COMPLETE
        assert len(part.curve) == len(one.curve)
        for mine, theirs in zip(part.curve, one.curve, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("count", "stacks"), [(1, 1), (2, 2), (3, 2), (9, 2)])
def test_heads_are_cut_into_a_part_a_thread(two_threads: None, count: int, stacks: int) -> None:
    heads = [TrialConfig(backbone="ffn", epochs=1, seed=seed) for seed in range(count)]
    assert len(_parts(heads)) == stacks


def test_stacks_of_less_than_a_threads_share_stay_whole(two_threads: None) -> None:
    heads = [
        TrialConfig(backbone="ffn", epochs=1, seed=seed, batch_size=size)
        for seed in range(4)
        for size in (40, 41)
    ]
    assert [len(part.configs) for part in _parts(heads)] == [4, 4]


def _parts(heads: list[TrialConfig]) -> list[group.Part]:
    features, targets_NC = _data()
    task = Task(
        targets_NC=targets_NC,
        folds=HOLD_OUT,
        objective="top3_accuracy",
        order_seed=0,
        precision="float32",
        last_epoch=None,
    )
    sources = [group.Source(features=features)]
    return probe._parts(sources, [0] * len(heads), heads, task, "cpu")


def test_threads_are_given_back(two_threads: None) -> None:
    seen: list[int] = []

    def report(epoch: int, metrics: Any) -> tuple[int, ...]:
        seen.append(torch.get_num_threads())
        if epoch == 2:
            raise KeyboardInterrupt
        return ()

    with pytest.raises(KeyboardInterrupt):
        _train(_heads(16), report=report)
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2


def test_the_same_run_twice_is_identical(two_threads: None) -> None:
    first, second = _train(_heads(16)), _train(_heads(16))
    assert [o.curve for o in first] == [o.curve for o in second]


def test_lower_precision_trains_as_well_but_not_the_same() -> None:
    """Weights, losses and metrics stay float32: only a step's products are rounded."""
    configs = _heads(16)
    exact, rounded = (
        _train(configs, keep_state=True),
        _train(configs, precision=BFLOAT16, keep_state=True),
    )
    assert [o.curve for o in exact] != [o.curve for o in rounded]
    for one, other in zip(exact, rounded, strict=True):
        assert other.state is not None
        assert {t.dtype for t in other.state.values()} == {torch.float32}
        assert len(one.curve) == len(other.curve)
        for mine, theirs in zip(one.curve, other.curve, strict=True):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
            assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=0.05)
