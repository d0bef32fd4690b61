"""Stochastic depth: how likely a residual block is left out for a picture while training.

The linear rule of Huang et al. 2016: nothing at the first block, the whole probability at the
last, in the very figures that building the network with that probability gives. Torchvision's
networks have the layer in place and only its probability is set; timm's have it only where they
were built with one, so such a network is built again as a sketch without memory, and copied from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..encoding.networks import TimmNetwork

_BLOCKS_OF_BLOCKS = ("MaxVitLayer",)
"""Torchvision's blocks that hold several layers of stochastic depth at one depth."""
_SHORT_OF_THE_LAST = ("MBConv", "FusedMBConv")
"""Blocks of networks (EfficientNet) that count one block more than there is, so that the last one
stays a step below the whole probability."""


def set_drop_path(network: nn.Module, probability: float) -> int:
    """Set the probability on every layer of stochastic depth (timm: drop path) of a network.

    They act in training mode only. Modes are not touched.

    Args:
        probability: that of the last block, 0 <= p < 1.

    Returns:
        How many layers were set; 0 where the network knows no stochastic depth.
    """
    assert 0 <= probability < 1
    num_timm = sum(
        _set_timm(module.model, probability)
        for module in network.modules()
        if isinstance(module, TimmNetwork)
    )
    return num_timm + _set_torchvision(network, probability)


def _set_torchvision(network: nn.Module, probability: float) -> int:
    from torchvision.ops import StochasticDepth

    found = [(n, m) for n, m in network.named_modules() if isinstance(m, StochasticDepth)]
    blocks = [_block(network, name) for name, _ in found]
    depths = {block: depth for depth, block in enumerate(dict.fromkeys(blocks))}
    kinds = {type(network.get_submodule(block)).__name__ for block in depths}
    last = len(depths) if kinds & set(_SHORT_OF_THE_LAST) else len(depths) - 1
    for (_, layer), block in zip(found, blocks, strict=True):
        layer.p = probability * depths[block] / max(last, 1)
    return len(found)


def _block(network: nn.Module, name: str) -> str:
    """The name of the block that a layer of stochastic depth belongs to."""
    parts = name.split(".")[:-1]
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if type(network.get_submodule(outer)).__name__ in _BLOCKS_OF_BLOCKS:
            return outer
    return ".".join(parts)


def _set_timm(model: nn.Module, probability: float) -> int:
    from timm.layers.drop import DropPath

    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    present = dict(model.named_modules())
    num_set = 0
    for name, layer in _sketch(model, probability).named_modules():
        parent, _, attribute = name.rpartition(".")
        if isinstance(layer, DropPath) and parent in present:
            setattr(present[parent], attribute, layer)
            num_set += 1
    return num_set


def _sketch(model: Any, probability: float) -> nn.Module:
    """The same timm model built with this probability, its tensors without memory; an empty
    module where timm has no such setting for it."""
    import timm

    create: Any = timm.create_model
    name = model.pretrained_cfg["architecture"]
    try:
        with torch.device("meta"):
            sketch: nn.Module = create(name, num_classes=0, drop_path_rate=probability)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        return nn.Module()
    return sketch
