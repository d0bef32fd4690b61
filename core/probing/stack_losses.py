"""The losses of a stack's heads and their gradients by the logits, as training and judging read
them: on a CPU by compiled kernels, elsewhere by autograd. Letters as in `core.probing.stack`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.losses import LOSS_KERNELS
from ..losses import LOSSES


@dataclass(frozen=True, kw_only=True)
class LossRun:
    """Neighbouring heads of a stack that have one loss."""

    name: str
    heads: slice
    settings: Mapping[str, Tensor]
    """Those of the loss and `label_smoothing`: [h]."""
    class_weights_hC: Tensor | None


class StackLosses(Protocol):
    """Means over the pictures, of logits [H, B, C] and targets [B, C]."""

    def means(self, logits_HBC: Tensor, targets_BC: Tensor) -> Tensor:
        """The loss of every head [H] (float64)."""
        ...

    def slopes(self, logits_HBC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its gradient by the logits [H, B, C] (float32)."""
        ...


class CompiledLosses:
    """By `core.kernels.losses`."""

    def __init__(self, runs: Sequence[LossRun], num_classes: int) -> None:
        self._runs = [
            (LOSS_KERNELS[run.name].function, run.heads, _arguments(run, num_classes))
            for run in runs
        ]

    def means(self, logits_HBC: Tensor, targets_BC: Tensor) -> Tensor:
        return self.slopes(logits_HBC, targets_BC)[0]

    def slopes(self, logits_HBC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_HBC.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        slopes_HBC = torch.empty_like(logits)
        means_H = np.empty(len(logits))
        logits_HL, slopes_HL = logits.flatten(1).numpy(), slopes_HBC.flatten(1).numpy()
        targets_L = targets_BC.flatten().numpy()
        for kernel, heads, arguments in self._runs:
            kernel(logits_HL[heads], targets_L, *arguments, means_H[heads], slopes_HL[heads])
        return torch.from_numpy(means_H), slopes_HBC


def _arguments(run: LossRun, num_classes: int) -> list[Any]:
    """What the kernel reads of each head, in its order."""
    names = ("label_smoothing", *LOSS_KERNELS[run.name].parameters)
    values = [run.settings[name].float() for name in names]
    weights_hC = run.class_weights_hC
    if weights_hC is None:
        weights_hC = torch.ones(len(values[0]), num_classes)
    return [value.contiguous().numpy() for value in (weights_hC, *values)]


class DifferentiatedLosses:
    """By `core.losses` and autograd, on any device."""

    def __init__(self, runs: Sequence[LossRun]) -> None:
        self._runs = [
            (
                LOSSES[run.name].function,
                run.heads,
                {
                    "label_smoothing": run.settings["label_smoothing"].view(-1, 1, 1),
                    "class_weights_C": None
                    if run.class_weights_hC is None
                    else run.class_weights_hC.unsqueeze(1),
                    **{p: run.settings[p].view(-1, 1, 1) for p in LOSSES[run.name].parameters},
                },
            )
            for run in runs
        ]

    def means(self, logits_HBC: Tensor, targets_BC: Tensor) -> Tensor:
        losses = [
            function(logits_HBC[heads].float(), targets_BC, **settings).mean(1)
            for function, heads, settings in self._runs
        ]
        return torch.cat(losses).double()

    def slopes(self, logits_HBC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
        leaf_HBC = logits_HBC.detach().float().requires_grad_()
        with torch.enable_grad():
            means_H = self.means(leaf_HBC, targets_BC)
            (slopes_HBC,) = torch.autograd.grad(means_H.sum(), leaf_HBC)
        return means_H.detach(), slopes_HBC
