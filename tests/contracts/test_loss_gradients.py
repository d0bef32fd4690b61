"""A loss' closed form equals the loss, and its gradient equals autograd's.

N pictures, H heads, C classes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from core.loss_gradients import LOSSES_WITH_GRADIENTS
from core.losses import LOSSES

N, C = 64, 7
CHOICES = {
    "gamma": [0.0, 0.5, 3.0],
    "gamma_positive": [0.0, 0.4, 2.0],
    "gamma_negative": [0.0, 0.4, 4.0],
    "clip": [0.0, 0.05, 0.9],
}


def _targets(dtype: torch.dtype) -> Tensor:
    targets_NC = (torch.rand(N, C, generator=torch.Generator().manual_seed(1)) < 0.4).to(dtype)
    targets_NC[0] = 0  # a picture without labels
    return targets_NC


def _weights(dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.2, 2.0, C, dtype=dtype)


def _oracle(name: str, logits: Tensor, targets: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = LOSSES[name].function(leaf, targets, **settings)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def test_every_loss_has_a_closed_form() -> None:
    assert LOSSES_WITH_GRADIENTS.keys() == LOSSES.keys()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_autograd(name: str, weighted: bool, smoothing: float) -> None:
    """At moderate logits in float64, for every mixture of the loss' own settings."""
    generator = torch.Generator().manual_seed(0)
    logits_NC = 3 * torch.randn(N, C, generator=generator, dtype=torch.float64)
    kept = logits_NC.clone()
    targets_NC = _targets(torch.float64)
    shared = {
        "label_smoothing": smoothing,
        "class_weights_C": _weights(torch.float64) if weighted else None,
    }
    names = LOSSES[name].parameters
    for values in itertools.product(*(CHOICES[n] for n in names)):
        settings = {**shared, **dict(zip(names, values, strict=True))}
        expected = _oracle(name, logits_NC, targets_NC, **settings)
        found = LOSSES_WITH_GRADIENTS[name](logits_NC, targets_NC, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        assert torch.equal(logits_NC, kept)  # the caller's
        assert torch.equal(targets_NC, _targets(torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_autograd_however_sure_the_head(name: str, scale: float, weighted: bool) -> None:
    """In float32, where probabilities are rounded to 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    logits_NC = scale * torch.randn(N, C, generator=generator)
    targets_NC = _targets(torch.float32)
    for smoothing, place in itertools.product((0.0, 0.1), range(3)):
        settings: dict[str, Any] = {n: CHOICES[n][place] for n in LOSSES[name].parameters}
        settings["label_smoothing"] = smoothing
        settings["class_weights_C"] = _weights(torch.float32) if weighted else None
        expected = _oracle(name, logits_NC, targets_NC, **settings)
        found = LOSSES_WITH_GRADIENTS[name](logits_NC, targets_NC, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_setting_each_equals_autograd(name: str) -> None:
    """Parameters [H, 1] and class weights [H, C], as a stack gives them, on a part of it."""
    generator = torch.Generator().manual_seed(2)
    stack_NHC = 2 * torch.randn(N, 5, C, generator=generator, dtype=torch.float64)
    targets_N1C = _targets(torch.float64).unsqueeze(1)
    settings: dict[str, Any] = {
        n: torch.tensor(CHOICES[n], dtype=torch.float64).unsqueeze(1)
        for n in LOSSES[name].parameters
    }
    settings["label_smoothing"] = torch.tensor([[0.0], [0.1], [0.4]], dtype=torch.float64)
    settings["class_weights_C"] = torch.rand(3, C, generator=generator, dtype=torch.float64) + 0.5
    expected = _oracle(name, stack_NHC[:, 1:4], targets_N1C, **settings)
    found = LOSSES_WITH_GRADIENTS[name](stack_NHC[:, 1:4], targets_N1C, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_diverged_head_shows_in_its_own_loss_only(name: str) -> None:
    logits_NHC = torch.zeros(2, 2, C)
    logits_NHC[:, 1] = torch.nan
    losses_NH, gradient_NHC = LOSSES_WITH_GRADIENTS[name](logits_NHC, torch.ones(2, 1, C))
    assert losses_NH[:, 0].isfinite().all()
    assert gradient_NHC[:, 0].isfinite().all()
    assert losses_NH[:, 1].isnan().all()
