"""Which learning rate and weight decay each parameter of a fine-tuned model has.

Stages nearer to the input learn more slowly, as what they know is more general (layer-wise decay,
Howard & Ruder 2018; per stage here). Biases and the parameters of norms are never decayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..optimizers import OPTIMIZERS

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
"""Every norm of torch: _NormBase is what batch and instance norms of all kinds are."""


def build_optimizer(
    kind: str,
    groups: Sequence[Mapping[str, Any]],
    *,
    lr: float,
    settings: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """torch's optimizer of a name in OPTIMIZERS over groups of `parameter_groups`.

    `settings` holds at least the optimizer's own parameters; others are not read.
    """
    record = OPTIMIZERS[kind]
    read = {name: settings[name] for name in record.parameters}
    return record.build([dict(group) for group in groups], lr=lr, **read)


def parameter_groups(
    stages: Sequence[nn.Module],
    head: nn.Module,
    *,
    lr: float,
    layer_lr_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them, from input to head; empty ones are left out.

    Each group's `peak` is the rate that the schedule's factor multiplies: `lr` for the last stage,
    `layer_lr_decay` times as much from each stage to the one before it, and `head_lr_multiplier`
    times `lr` for the head.

    Args:
        stages: those that are or will be trained, from input to output.
    """
    rates = [lr * layer_lr_decay ** (len(stages) - 1 - place) for place in range(len(stages))]
    groups = []
    taken: set[int] = set()  # a parameter that two stages share is the earlier one's
    parts = [*zip(stages, rates, strict=True), (head, lr * head_lr_multiplier)]
    for part, peak in parts:
        named = [(p, decayed) for p, decayed in _parameters(part) if id(p) not in taken]
        taken.update(id(p) for p, _ in named)
        for decay in (True, False):
            params = [p for p, decayed in named if decayed == decay]
            if params:
                applied = weight_decay if decay else 0.0
                groups.append({"params": params, "weight_decay": applied, "peak": peak})
    return groups


def _parameters(part: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Each parameter, once, and whether weight decay is for it."""
    seen: set[int] = set()
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # Scales and shifts are vectors; tables of position biases (Swin) are not, so by name.
            weight = parameter.ndim > 1 and not isinstance(module, NORMS) and "bias" not in name
            yield parameter, weight
