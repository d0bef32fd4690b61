"""Optimizers, twice: torch's own for a model, and the same rules over stacked heads.

A rule updates a stack of weights [H, ...] in place, with one value of every setting a head
(tensors [H, 1...], broadcastable to the weights). On a CPU, where memory is what an update waits
for, torch's fused kernels go through one head's weights in a single pass. The contract test holds
both to their `torch.optim` counterpart. H: heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8
"""Added to denominators, torch's default for all of them."""

Settings = dict[str, Tensor]
Numbers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One optimizer: how torch builds it, and its rule over stacked weights."""

    build: Callable[..., torch.optim.Optimizer]
    """(parameter groups, lr=..., weight_decay=..., **parameters) -> torch's optimizer."""
    update: Callable[[Tensor, Tensor, Sequence[Tensor], int, Settings], None]
    """(weights, gradients, slots, step counted from 1, settings): changes weights and slots."""
    num_slots: int
    """State tensors of the weights' shape that the rule keeps; they start at zero."""
    fused: Callable[[Tensor, Tensor, Sequence[Tensor], int, Numbers], None] | None = None
    """As `update`, for one head on a CPU and with plain numbers; None where torch has no kernel."""
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


def _fused_sgd(
    weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Numbers
) -> None:
    torch._fused_sgd_(
        [weights],
        [grad],
        list(slots) if s["momentum"] else [],
        lr=s["lr"],
        weight_decay=s["weight_decay"],
        momentum=s["momentum"],
        dampening=0.0,
        nesterov=bool(s["nesterov"]),
        maximize=False,
        is_first_step=False,  # The buffer starts at zero: see `_sgd`.
    )


def _fused_adam(
    kernel: Callable[..., None],
) -> Callable[[Tensor, Tensor, Sequence[Tensor], int, Numbers], None]:
    def update(
        weights: Tensor, grad: Tensor, slots: Sequence[Tensor], step: int, s: Numbers
    ) -> None:
        first, second = slots
        kernel(
            [weights],
            [grad],
            [first],
            [second],
            [],
            [_count(step)],
            lr=s["lr"],
            beta1=s["beta1"],
            beta2=s["beta2"],
            weight_decay=s["weight_decay"],
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    return update


@lru_cache(maxsize=64)
def _count(step: int) -> Tensor:
    """A step's number as the kernels want it; all heads of a stack ask for the same one."""
    return torch.tensor(float(step))


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
        fused=_fused_sgd,
        num_slots=1,
        parameters=("momentum", "nesterov"),
    ),
    "adam": Optimizer(
        build=_betas(torch.optim.Adam),
        update=_adam,
        fused=_fused_adam(torch._fused_adam_),
        num_slots=2,
        parameters=("beta1", "beta2"),
    ),
    "adamw": Optimizer(
        build=_betas(torch.optim.AdamW),
        update=_adamw,
        fused=_fused_adam(torch._fused_adamw_),
        num_slots=2,
        parameters=("beta1", "beta2"),
    ),
    "rmsprop": Optimizer(
        build=torch.optim.RMSprop, update=_rmsprop, num_slots=1, parameters=("alpha",)
    ),
}
