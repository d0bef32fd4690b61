"""Training to a given epoch of the schedule and keeping that epoch: what a refit is.

N pictures, D features, C classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.config import TrialConfig
from core.encoding.backbones import Backbone
from core.encoding.encoders import Encoder
from core.finetuning.checkpoint import Checkpoints
from core.finetuning.finetune import finetune
from core.heads import build_head
from core.probing.probe import train_probes
from core.report import Metrics, Outcome, Status
from core.schedules import rate_factors

N, D, C = 48, 10, 5
TRAIN = np.arange(N, dtype=np.int64)
VALIDATION = np.arange(36, N, dtype=np.int64)
"""Inside of TRAIN, as it is in a refit."""
PROBE = TrialConfig(
    backbone="ffn",
    optimizer="sgd",
    lr=0.5,
    schedule="cosine",
    epochs=9,
    batch_size=16,
    feature_norm="none",
    seed=3,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def _data() -> tuple[np.ndarray, Tensor]:
    rng = np.random.default_rng(0)
    targets_NC = (rng.random((N, C)) < 0.4).astype(np.float32)
    targets_NC[np.arange(N), rng.integers(0, C, N)] = 1
    features = targets_NC @ rng.normal(size=(C, D)) + 2 * rng.normal(size=(N, D))
    return features.astype(np.float32), torch.from_numpy(targets_NC)


@pytest.mark.parametrize("last", [1, 4, 9])
def test_a_probe_ends_with_the_weights_of_that_epoch(last: int) -> None:
    """A plain loop with torch.optim, the schedule made for all nine epochs."""
    features, targets_NC = _data()
    (outcome,) = train_probes(
        features, targets_NC, [(TRAIN, VALIDATION)], [PROBE], keep_state=True, last_epoch=last
    )
    head = build_head("linear", num_features=D, num_classes=C, seed=PROBE.seed)
    optimizer = torch.optim.SGD(head.parameters(), lr=PROBE.lr)
    factors = iter(rate_factors("cosine", num_steps=27, warmup_fraction=0.0))
    for epoch in range(1, last + 1):
        order = np.random.default_rng([0, epoch]).permutation(TRAIN)
        for start in range(0, N, 16):
            rows = order[start : start + 16]
            optimizer.param_groups[0]["lr"] = PROBE.lr * float(next(factors))
            logits = head(torch.from_numpy(features[rows]))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets_NC[rows])
            # The loss of a picture is summed over its classes or averaged: see core.losses.
            optimizer.zero_grad()
            (loss * _loss_scale()).backward()
            optimizer.step()
    assert (outcome.status, outcome.best_epoch, len(outcome.curve)) == (
        Status.COMPLETE,
        last,
        last,
    )
    assert outcome.best_value == outcome.curve[-1]["validation_top3_accuracy"]
    assert outcome.state is not None
    for name, value in head.state_dict().items():
        torch.testing.assert_close(outcome.state[name], value, atol=1e-5, rtol=1e-4)


def _loss_scale() -> float:
    """Of core's BCE against the mean over pictures and classes."""
    from core.losses import LOSSES

    logits, targets = torch.zeros(1, C), torch.ones(1, C)
    ours = LOSSES["bce"].function(logits, targets, label_smoothing=0.0, class_weights_C=None)
    return float(ours.mean() / nn.functional.binary_cross_entropy_with_logits(logits, targets))


def test_heads_of_a_stack_end_together_and_beyond_their_own_end_never() -> None:
    features, targets_NC = _data()
    configs = [PROBE, dataclasses.replace(PROBE, epochs=3, seed=4)]
    outcomes = train_probes(features, targets_NC, [(TRAIN, VALIDATION)], configs, last_epoch=5)
    assert [outcome.best_epoch for outcome in outcomes] == [5, 3]


FINETUNE = dataclasses.replace(
    PROBE, backbone="tiny", mode="finetune", unfrozen_stages=2, feature_norm="standardize", lr=0.05
)


def _finetune(last: int | None, **settings: object) -> Outcome:
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())

    def keep_going(epoch: int, metrics: Metrics) -> bool:
        return False

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(block(3, 4), block(4, 6), block(6, 8))
    pictures = np.random.default_rng(1).integers(0, 256, (N, 24, 24, 3), dtype=np.uint8)
    return finetune(
        Encoder(Backbone(name="tiny", input_size=24), network),
        pictures,
        _data()[1],
        TRAIN,
        VALIDATION,
        FINETUNE,
        last_epoch=last,
        **{"report": keep_going, **settings},
    )


def test_a_fine_tuning_ends_with_the_weights_of_that_epoch(tmp_path: Path) -> None:
    """The checkpoint that a longer run of the same schedule wrote at that epoch."""
    checkpoints = Checkpoints(tmp_path)

    def stop_at_four(epoch: int, metrics: Metrics) -> bool:
        return epoch == 4

    stopped = _finetune(None, report=stop_at_four, checkpoints=checkpoints)
    assert stopped.status is Status.PRUNED
    saved = checkpoints.load()
    assert saved is not None
    outcome = _finetune(4)
    assert (outcome.status, outcome.best_epoch) == (Status.COMPLETE, 4)
    assert outcome.curve == stopped.curve
    assert outcome.state is not None
    for name, value in saved["model"].items():
        assert torch.equal(outcome.state[name], value), name
    assert max(m["validation_top3_accuracy"] for m in outcome.curve) >= (outcome.best_value or 2)


def test_a_refit_does_not_go_on_from_a_checkpoint_of_another_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _finetune(3, checkpoints=Checkpoints(tmp_path))
    second = _finetune(5, checkpoints=Checkpoints(tmp_path))
    assert "checkpoint of another trial" in caplog.text
    assert second.curve[:3] == first.curve
    assert second.best_epoch == 5
