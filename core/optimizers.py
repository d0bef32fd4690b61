"""Optimizers, twice: torch's own for a model, and the same rules over stacked heads.

A rule updates a stack of weights [H, ...] in place, with one value of every setting a head
(tensors [H, 1...], broadcastable to the weights). On a CPU `core.kernels.updates` does the same in
one pass over the weights. The contract test holds all to their `torch.optim` counterpart. H: heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8
"""Added to denominators, torch's default for all of them."""

Settings = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One optimizer: how torch builds it, and its rule over stacked weights."""

    build: Callable[..., torch.optim.Optimizer]
    """(parameter groups, lr=..., weight_decay=..., **parameters) -> torch's optimizer."""
    update: Callable[[Tensor, Tensor, Sequence[Tensor], int, Settings], None]
    """(weights, gradients, slots, step counted from 1, settings): changes weights and slots."""
    num_slots: int
    """State tensors of the weights' shape that the rule keeps; they start at zero."""
    parameters: tuple[str, ...] = ()
    """Fields of `TrialConfig` it reads besides lr and weight_decay."""


def _sgd(weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Settings) -> None:
    # The buffer starts at zero, so its first value is the gradient itself, as torch's is.
    grad = grad.addcmul(weights, s["weight_decay"])
    (buffer,) = slots
    buffer.mul_(s["momentum"]).add_(grad)
    # Torch's step is lr * buffer, or lr * (grad + momentum * buffer) with Nesterov's momentum.
    nesterov = s["nesterov"]
    weights.addcmul_(buffer, -s["lr"] * torch.where(nesterov > 0, s["momentum"], 1.0))
    weights.addcmul_(grad, -s["lr"] * nesterov)


def _adam(weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Settings) -> None:
    _adam_step(weights, grad.addcmul(weights, s["weight_decay"]), slots, step, s)


def _adamw(weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Settings) -> None:
    weights.mul_(1 - s["lr"] * s["weight_decay"])
    _adam_step(weights, grad, slots, step, s)


def _adam_step(
    weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Settings
) -> None:
    first, second = slots
    beta1, beta2 = s["beta1"], s["beta2"]
    first.lerp_(grad, (1 - beta1).expand_as(grad))
    second.mul_(beta2).addcmul_(grad, grad * (1 - beta2))
    denominator = second.sqrt().div_((1 - beta2**step).sqrt()).add_(EPS)
    weights.addcdiv_(first * (-s["lr"] / (1 - beta1**step)), denominator)


def _rmsprop(
    weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Settings
) -> None:
    grad = grad.addcmul(weights, s["weight_decay"])
    (square,) = slots
    square.mul_(s["alpha"]).addcmul_(grad, grad * (1 - s["alpha"]))
    weights.addcdiv_(grad * -s["lr"], square.sqrt().add_(EPS))


def _betas(build: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    def with_betas(
        groups: Any, *, beta1: float, beta2: float, **settings: Any
    ) -> torch.optim.Optimizer:
        return build(groups, betas=(beta1, beta2), **settings)

    return with_betas


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        build=torch.optim.SGD,
        update=_sgd,
        num_slots=1,
        parameters=("momentum", "nesterov"),
    ),
    "adam": Optimizer(
        build=_betas(torch.optim.Adam),
        update=_adam,
        num_slots=2,
        parameters=("beta1", "beta2"),
    ),
    "adamw": Optimizer(
        build=_betas(torch.optim.AdamW),
        update=_adamw,
        num_slots=2,
        parameters=("beta1", "beta2"),
    ),
    "rmsprop": Optimizer(
        build=torch.optim.RMSprop, update=_rmsprop, num_slots=1, parameters=("alpha",)
    ),
}
