"""The updates of a stack's weights by their gradients: on a CPU by compiled kernels, elsewhere by
the rules of `core.optimizers`.

What does not change from step to step (views of the weights, of their gradients and of the
optimizers' slots, settings as they are read) is made once, and again only when heads leave. Letters
as in `core.probing.stack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.updates import UPDATE_KERNELS
from ..optimizers import OPTIMIZERS, Settings


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One parameter of all heads, with all that an update reads and changes."""

    values: Tensor
    """[H, ...], float32."""
    gradient: Tensor
    """Of the same shape, where each step leaves it; float32 or bfloat16."""
    narrow: Tensor | None
    """Their copy in the type of products, if it is another."""
    slots: Sequence[Tensor]
    """The optimizers' state."""
    decaying: bool
    """Whether weight decay acts on them: not on biases."""


@dataclass(frozen=True, kw_only=True)
class OptimizerRun:
    """Neighbouring heads of a stack that have one optimizer."""

    name: str
    heads: slice
    settings: Settings
    """Those of the optimizer and `weight_decay`: [h]."""


class StackUpdates(Protocol):
    """Changes weights, their copies and slots in place."""

    def __call__(self, step: int) -> None:
        """One step, counted from 1."""
        ...


class CompiledUpdates:
    """By `core.kernels.updates`.

    Args:
        weights: of each layer.
        runs: of all heads.
        rates_HT: the learning rate of every head at every step.
    """

    def __init__(
        self, weights: Sequence[Weights], runs: Sequence[OptimizerRun], rates_HT: Tensor
    ) -> None:
        self._rates_TH = rates_HT.double().T.contiguous().numpy()
        self._runs = [
            (run.heads, _kernel_of(group, run, len(rates_HT))) for run in runs for group in weights
        ]

    def __call__(self, step: int) -> None:
        rates_H = self._rates_TH[step - 1]
        for heads, kernel in self._runs:
            kernel(rates_H[heads], step)


def _kernel_of(group: Weights, run: OptimizerRun, num_heads: int) -> Callable[[Any, int], None]:
    """The kernel with all that it takes but rates and step."""
    kernel = UPDATE_KERNELS[run.name]
    none_wide, none_narrow = (
        np.empty((num_heads, 0), np.float32),
        np.empty((num_heads, 0), np.uint16),
    )
    is_narrow = group.gradient.dtype == torch.bfloat16
    gradient = _rows(group.gradient)
    decay_H = run.settings["weight_decay"].double().numpy()
    arrays = (
        _rows(group.values),
        none_wide if is_narrow else gradient,
        gradient if is_narrow else none_narrow,
        none_narrow if group.narrow is None else _rows(group.narrow),
    )
    return partial(
        kernel.function,
        *(array[run.heads] for array in arrays),
        tuple(_rows(slot)[run.heads] for slot in group.slots[: kernel.num_slots]),
        decay_H if group.decaying else np.zeros_like(decay_H),
        *(run.settings[name].double().numpy() for name in kernel.parameters),
    )


def _rows(values: Tensor) -> Any:
    """A view [H, K]; of bfloat16, its bits."""
    flat = values.detach().flatten(1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


class RuleUpdates:
    """By the rules of `core.optimizers`, on any device; arguments as for `CompiledUpdates`."""

    def __init__(
        self, weights: Sequence[Weights], runs: Sequence[OptimizerRun], rates_HT: Tensor
    ) -> None:
        self._weights = weights
        self._rates_HT = rates_HT
        self._runs = [(group, run, _broadcast(group, run)) for run in runs for group in weights]

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        for group, run, settings in self._runs:
            rates = self._rates_HT[run.heads, step - 1]
            optimizer = OPTIMIZERS[run.name]
            optimizer.update(
                group.values[run.heads],
                group.gradient[run.heads].float(),
                [slot[run.heads] for slot in group.slots[: optimizer.num_slots]],
                step,
                {**settings, "lr": rates.view(-1, *[1] * (group.values.dim() - 1))},
            )
        for group in self._weights:
            if group.narrow is not None:
                group.narrow.copy_(group.values)


def _broadcast(group: Weights, run: OptimizerRun) -> Settings:
    """Settings in the shape that the rules take."""
    shape = (-1, *[1] * (group.values.dim() - 1))
    settings = {name: value.view(shape) for name, value in run.settings.items()}
    if not group.decaying:
        settings["weight_decay"] = torch.zeros_like(settings["weight_decay"])
    return settings
