"""Small probes for the tests of `core.probing.probe`: data, trials, and how two outcomes compare.

N rows, D features, P places, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import TrialConfig
from core.images.views import BY_NAME
from core.probing.probe import train_probes
from core.report import Metrics, Outcome

N, D, P, C = 150, 8, 4, 5
TRAIN, VALIDATION = np.arange(100, dtype=np.int64), np.arange(100, N, dtype=np.int64)
HOLD_OUT = [(TRAIN, VALIDATION)]
FEW = TrialConfig(backbone="ffn", epochs=4, batch_size=32, lr=0.05)
NAMES = {
    "train_loss",
    "train_top3_accuracy",
    "validation_loss",
    "validation_top3_accuracy",
    "lr",
}


def make_data(*, spatial: bool = False) -> tuple[np.ndarray, Tensor]:
    """Features from which the labels can be told, but not without fault."""
    rng = np.random.default_rng(0)
    targets = (rng.random((N, C)) < [0.5, 0.4, 0.3, 0.3, 0.2]).astype(np.float32)
    targets[:, 0] = np.maximum(targets[:, 0], targets.sum(1) == 0)
    pooled = targets @ rng.normal(0, 1, (C, D)) + rng.normal(0, 1.5, (N, D)) + 3
    if not spatial:
        return pooled.astype(np.float32), torch.from_numpy(targets)
    places = pooled[:, None] + rng.normal(0, 0.5, (N, P, D))
    return places.astype(np.float16), torch.from_numpy(targets)


def train_all(configs: list[TrialConfig], **settings: Any) -> list[Outcome]:
    features, targets_NC = make_data(spatial=configs[0].head == "csra")
    return train_probes(features, targets_NC, HOLD_OUT, configs, **settings)


def variants(config: TrialConfig = FEW, count: int = 5) -> list[TrialConfig]:
    """Trials of several stacks and of several kinds."""
    changes: list[dict[str, Any]] = [
        {"lr": 0.2, "optimizer": "sgd"},
        {"head": "mlp", "hidden_sizes": (6,), "dropout": 0.2},
        {"loss": "cross_entropy", "class_weights": "inverse", "seed": 3},
        {"batch_size": 50, "loss": "asymmetric"},
        {"feature_norm": "none", "optimizer": "rmsprop", "epochs": 2},
    ]
    return [dataclasses.replace(config, **change) for change in changes[:count]]


def views_of(features: np.ndarray) -> dict[str, np.ndarray]:
    """Every further view there is: the features with noise of its own."""
    names = [name for name in BY_NAME if name != "plain"]
    rngs = [np.random.default_rng(100 + place) for place, _ in enumerate(names)]
    return {
        name: (features + rng.normal(0, 1, features.shape)).astype(features.dtype)
        for name, rng in zip(names, rngs, strict=True)
    }


def assert_same_curve(first: Sequence[Metrics], second: Sequence[Metrics]) -> None:
    """Equal up to the rounding of another stack's products."""
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def assert_same(first: Outcome, second: Outcome, *, exactly: bool = True) -> None:
    """Equal but for the time: exactly, or up to the rounding of another stack's products."""
    assert (first.status, first.reason) == (second.status, second.reason)
    if exactly:
        assert first.curve == second.curve
    assert_same_curve(first.curve, second.curve)
    for name in ("best_epoch", "best_value", "best_metrics"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert ours == (theirs if exactly else pytest.approx(theirs, rel=1e-4)), name
    if first.state is not None and second.state is not None:
        for key, weight in first.state.items():
            torch.testing.assert_close(weight, second.state[key], rtol=1e-3, atol=1e-5)
