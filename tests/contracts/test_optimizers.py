"""Every optimizer of the registry learns, as torch's module and as a rule over a stack.

That the two agree step by step is held in test_stack.py. H heads, K weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.config import TrialConfig
from core.optimizers import OPTIMIZERS

STEPS = 60
SETTINGS = {"momentum": 0.5, "nesterov": True, "beta1": 0.8, "beta2": 0.9, "alpha": 0.9}


def _target() -> Tensor:
    return torch.linspace(-1, 1, 8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_module_reduces_a_loss(name: str) -> None:
    kind = OPTIMIZERS[name]
    weights_K = torch.zeros(8, requires_grad=True)
    optimizer = kind.build(
        [{"params": [weights_K]}],
        lr=0.05,
        weight_decay=0.0,
        **{key: SETTINGS[key] for key in kind.parameters},
    )
    losses = []
    for _ in range(STEPS):
        loss = (weights_K - _target()).square().sum()
        losses.append(loss.detach().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rule_reduces_the_loss_of_each_head(name: str) -> None:
    kind = OPTIMIZERS[name]
    weights_HK = torch.zeros(3, 8)
    slots = [torch.zeros_like(weights_HK) for _ in range(kind.num_slots)]
    settings = {key: torch.full((3, 1), float(SETTINGS[key])) for key in kind.parameters}
    settings["lr"] = torch.tensor([[0.05], [0.0], [0.02]])
    settings["weight_decay"] = torch.zeros(3, 1)
    first_H = (weights_HK - _target()).square().sum(1)
    for step in range(1, STEPS + 1):
        kind.update(weights_HK, 2 * (weights_HK - _target()), slots, step, settings)
    last_H = (weights_HK - _target()).square().sum(1)
    assert last_H[0] < 0.05 * first_H[0]
    assert last_H[1] == first_H[1]  # each head has its own rate
    assert last_H[0] < last_H[2] < first_H[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_weights_that_get_no_gradient(name: str) -> None:
    kind = OPTIMIZERS[name]
    weights_HK = torch.ones(2, 8)
    slots = [torch.zeros_like(weights_HK) for _ in range(kind.num_slots)]
    settings = {key: torch.full((2, 1), float(SETTINGS[key])) for key in kind.parameters}
    settings["lr"] = torch.full((2, 1), 0.01)
    settings["weight_decay"] = torch.tensor([[0.0], [0.5]])
    for step in range(1, 11):
        kind.update(weights_HK, torch.zeros(2, 8), slots, step, settings)
    assert (weights_HK[0] == 1).all()
    assert (weights_HK[1] < 1).all()
    assert (weights_HK[1] > 0).all()


def test_parameters_are_settings_of_a_trial() -> None:
    config = TrialConfig(backbone="ffn")
    read = {key for kind in OPTIMIZERS.values() for key in kind.parameters}
    assert read == SETTINGS.keys()
    assert all(hasattr(config, key) for key in read)
