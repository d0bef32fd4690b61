"""Schedules against torch's own: the factors are its learning rates over the peak rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from core.schedules import SCHEDULES, rate_factors


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def _rates(scheduler: LRScheduler, num_steps: int) -> list[float]:
    rates = []
    for step in range(num_steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        if step + 1 < num_steps:
            scheduler.step()
    return rates


def test_constant_is_torchs() -> None:
    scheduler = LambdaLR(_optimizer(), lambda step: 1.0)
    factors = rate_factors("constant", num_steps=9, warmup_fraction=0.0)
    assert factors.tolist() == _rates(scheduler, 9)


@pytest.mark.parametrize("num_steps", [1, 2, 17, 100])
def test_cosine_without_warmup_is_torchs(num_steps: int) -> None:
    scheduler = CosineAnnealingLR(_optimizer(), T_max=num_steps)
    factors = rate_factors("cosine", num_steps=num_steps, warmup_fraction=0.0)
    np.testing.assert_allclose(factors, _rates(scheduler, num_steps), atol=1e-12)


@pytest.mark.parametrize(("num_steps", "warmup"), [(10, 1), (20, 5), (40, 39)])
def test_cosine_with_warmup_is_torchs_sequence(num_steps: int, warmup: int) -> None:
    optimizer = _optimizer()
    scheduler = SequentialLR(
        optimizer,
        [
            # From 1 / warmup by 1 / warmup to 1, which the cosine starts with once more.
            LinearLR(optimizer, 1 / warmup, 1.0, total_iters=max(warmup - 1, 1)),
            CosineAnnealingLR(optimizer, T_max=num_steps - warmup),
        ],
        milestones=[warmup],
    )
    factors = rate_factors("cosine", num_steps=num_steps, warmup_fraction=warmup / num_steps)
    np.testing.assert_allclose(factors, _rates(scheduler, num_steps), atol=1e-12)


@pytest.mark.parametrize("warmup_fraction", [0.1, 0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("num_steps", [30, 101])
def test_one_cycle_is_torchs(num_steps: int, warmup_fraction: float) -> None:
    scheduler = OneCycleLR(
        _optimizer(),
        max_lr=1.0,
        total_steps=num_steps,
        pct_start=warmup_fraction,
        cycle_momentum=False,
    )
    factors = rate_factors("one_cycle", num_steps=num_steps, warmup_fraction=warmup_fraction)
    np.testing.assert_allclose(factors, _rates(scheduler, num_steps), atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@given(num_steps=st.integers(1, 300), warmup_fraction=st.floats(0.001, 0.999))
def test_factors_are_usable_rates(name: str, num_steps: int, warmup_fraction: float) -> None:
    """However short the run: one finite factor a step, none above the peak, and some learning."""
    factors = rate_factors(name, num_steps=num_steps, warmup_fraction=warmup_fraction)
    assert factors.shape == (num_steps,)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert (factors <= 1 + 1e-12).all()
    peak = int(factors.argmax())
    assert (np.diff(factors[: peak + 1]) >= -1e-12).all()
    assert (np.diff(factors[peak:]) <= 1e-12).all()
