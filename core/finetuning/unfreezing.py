"""Which stages of a backbone are trained in an epoch, and in which mode its layers are.

Progressive unfreezing (Howard & Ruder 2018): from the output, one stage more every so many epochs.
A frozen stage is as the backbone came: no gradients, evaluation mode. So is an unfrozen one, but
for drop path (`core.finetuning.drop_path`) and, if they are to train, its batch norms: small
batches of a small set would spoil pretrained statistics, and folded ones must not be estimated
again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

DROP_PATHS = ("StochasticDepth", "DropPath")
"""What torchvision and timm call the layer; timm is not imported to ask."""


def num_unfrozen(limit: int | None, unfreeze_epochs: int, *, num_stages: int, epoch: int) -> int:
    """How many stages, from the output, are trained in an epoch (counted from 1).

    Args:
        limit: at most so many; None or more than there are: all.
        unfreeze_epochs: epochs from one stage to the next; 0: all from the start.
    """
    most = num_stages if limit is None else min(limit, num_stages)
    if unfreeze_epochs == 0:
        return most
    return min(most, 1 + (epoch - 1) // unfreeze_epochs)


def set_training(
    encoder: nn.Module,
    head: nn.Module,
    unfrozen: Sequence[nn.Module],
    *,
    drop_path: bool,
    batch_norms: bool,
) -> list[nn.Module]:
    """Set gradients and modes of a model that trains its head and some stages.

    Returns:
        The batch norms that train: those of the unfrozen stages if `batch_norms`, else none.
    """
    encoder.eval().requires_grad_(False)
    head.train()
    norms: list[nn.Module] = []
    for stage in unfrozen:
        stage.requires_grad_(True)
        for module in stage.modules():
            if drop_path and type(module).__name__ in DROP_PATHS:
                module.train()
        if batch_norms:
            norms += [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
    return norms
