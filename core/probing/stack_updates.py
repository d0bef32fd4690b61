"""The updates of a stack's weights, head by head or many at once, whichever waits for less.

A step of few heads is short, so what does not change from step to step (views of the weights and
of the optimizers' slots, settings in the shape that the rules take) is made once, and again only
when heads leave. Letters as in `core.probing.stack`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimizers import Optimizer, Settings

CPU_CHUNK = 1 << 17
"""Weights updated at a time on a CPU, so that the passes of an update stay in its cache."""
FEW_HEADS = 8
"""Below it, biases are updated head by head, too."""

Part = tuple[slice, slice]
"""Some heads, and of each some of its layer's outputs."""


@dataclass(frozen=True, kw_only=True)
class _OfHead:
    """The update of one head by a fused kernel: one pass over its weights instead of one an
    operation."""

    head: int
    optimizer: Optimizer
    weights: Tensor
    slots: Sequence[Tensor]
    numbers: dict[str, float]
    """Settings; the rate of each step is put in."""

    def __call__(self, gradients: Sequence[Tensor], rates: Sequence[float], step: int) -> None:
        assert self.optimizer.fused is not None
        self.numbers["lr"] = rates[self.head]
        self.optimizer.fused(self.weights, gradients[self.head], self.slots, step, self.numbers)


@dataclass(frozen=True, kw_only=True)
class _OfPart:
    """The update of several heads at once."""

    part: Part
    optimizer: Optimizer
    weights: Tensor
    slots: Sequence[Tensor]
    settings: Settings
    rates: Tensor
    """[h, 1..., T], to broadcast over the weights at each step."""

    def __call__(self, gradient: Tensor, step: int) -> None:
        settings = {**self.settings, "lr": self.rates[..., step - 1]}
        self.optimizer.update(self.weights, gradient[self.part], self.slots, step, settings)


class StackUpdates:
    """Changes the weights of a stack by their gradients.

    Args:
        params: weights and biases of each layer in turn, [H, ...]; changed in place.
        slots: the optimizers' state tensors, each a list as `params`; changed in place.
        runs: slices of heads that have one optimizer.
        settings: name -> [H], what the rules read but the rate.
        numbers: the same as plain numbers, a head.
        rates_HT: the learning rate of every head at every step.
    """

    @torch.no_grad()
    def __init__(
        self,
        params: Sequence[Tensor],
        slots: Sequence[Sequence[Tensor]],
        *,
        runs: Sequence[tuple[Optimizer, slice]],
        settings: Settings,
        numbers: Sequence[Mapping[str, float]],
        rates_HT: Tensor,
    ) -> None:
        self._rates_HT = rates_HT
        self._heads: list[list[_OfHead]] = []
        self._parts: list[list[_OfPart]] = []
        for place, param in enumerate(params):
            own = [slot[place] for slot in slots]
            decaying = place % 2 == 0
            heads: list[_OfHead] = []
            parts: list[_OfPart] = []
            for optimizer, run in runs:
                # Biases are small: there a call for each head costs more than passes over all.
                single = decaying or run.stop - run.start < FEW_HEADS
                if single and optimizer.fused is not None and param.device.type == "cpu":
                    heads += _of_heads(optimizer, run, param, own, numbers, decaying)
                else:
                    parts += _of_parts(optimizer, run, param, own, settings, rates_HT, decaying)
            self._heads.append(heads)
            self._parts.append(parts)

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor], step: int) -> None:
        """One step, counted from 1; gradients as the params."""
        rates = self._rates_HT[:, step - 1].tolist() if any(self._heads) else []
        for gradient, heads, parts in zip(gradients, self._heads, self._parts, strict=True):
            by_head = gradient.unbind() if heads else ()
            for head in heads:
                head(by_head, rates, step)
            for part in parts:
                part(gradient, step)


def _of_heads(
    optimizer: Optimizer,
    run: slice,
    param: Tensor,
    slots: Sequence[Tensor],
    numbers: Sequence[Mapping[str, float]],
    decaying: bool,
) -> Iterator[_OfHead]:
    for head in range(run.start, run.stop):
        yield _OfHead(
            head=head,
            optimizer=optimizer,
            weights=param[head],
            slots=[slot[head] for slot in slots[: optimizer.num_slots]],
            numbers={**numbers[head], **({} if decaying else {"weight_decay": 0.0})},
        )


def _of_parts(
    optimizer: Optimizer,
    run: slice,
    param: Tensor,
    slots: Sequence[Tensor],
    settings: Settings,
    rates_HT: Tensor,
    decaying: bool,
) -> Iterator[_OfPart]:
    shape = (-1, *[1] * (param.dim() - 1))
    for part in _chunks(run, param):
        heads = part[0]
        own = {key: settings[key][heads].view(shape) for key in optimizer.parameters}
        decay = settings["weight_decay"][heads].view(shape)
        own["weight_decay"] = decay if decaying else torch.zeros_like(decay)
        yield _OfPart(
            part=part,
            optimizer=optimizer,
            weights=param[part],
            slots=[slot[part] for slot in slots[: optimizer.num_slots]],
            settings=own,
            rates=rates_HT[heads].view(*shape, rates_HT.shape[1]),
        )


def _chunks(run: slice, param: Tensor) -> Iterator[Part]:
    """Parts of a run of heads, and of their layer's outputs where one head is too big."""
    num_outputs = param.shape[1]
    if param.device.type != "cpu":
        yield run, slice(0, num_outputs)
        return
    size = param[0].numel()
    heads_at_once = max(1, CPU_CHUNK // size)
    outputs_at_once = max(1, CPU_CHUNK * num_outputs // max(size, CPU_CHUNK))
    for head in range(run.start, run.stop, heads_at_once):
        heads = slice(head, min(head + heads_at_once, run.stop))
        for output in range(0, num_outputs, outputs_at_once):
            yield heads, slice(output, min(output + outputs_at_once, num_outputs))
