"""From feature maps to one vector a picture: what linear and mlp heads read.

With several blocks, the maps of the last stages are pooled one by one and laid side by side:
earlier stages know of colour and texture what the last one has given up for objects.
N pictures, D features, h w spatial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import unknown_name
from .encoders import Encoder


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """One way of making a map a vector."""

    function: Callable[[Tensor], Tensor]
    """[N, D, h, w] -> [N, `width` * D]."""
    width: int = 1
    """Values of each feature."""


def _average(features_NDhw: Tensor) -> Tensor:
    return features_NDhw.mean(dim=(2, 3))


def _maximum(features_NDhw: Tensor) -> Tensor:
    return features_NDhw.amax(dim=(2, 3))


def _both(features_NDhw: Tensor) -> Tensor:
    return torch.cat([_average(features_NDhw), _maximum(features_NDhw)], dim=1)


POOLINGS: dict[str, Pooling] = {
    "avg": Pooling(function=_average),
    "max": Pooling(function=_maximum),
    "avg_max": Pooling(function=_both, width=2),
}


def pool(features_NDhw: Tensor, pooling: str) -> Tensor:
    """One vector a picture [N, D], or [N, 2 D] for `avg_max`. Raises InputError for an unknown
    pooling."""
    if pooling not in POOLINGS:
        raise unknown_name("pooling", pooling, POOLINGS, where="pooling")
    return POOLINGS[pooling].function(features_NDhw)


def pooled_features(
    encoder: Encoder, images_N3hw: Tensor, *, pooling: str, blocks: int = 1
) -> Tensor:
    """Float32 pooled features of the last `blocks` stages, from the earliest to the last [N, D].

    Pictures are as `Encoder.forward` takes them. Raises InputError for an encoder with fewer
    stages.
    """
    maps = encoder.forward_blocks(images_N3hw, blocks)
    return torch.cat([pool(map_NDhw.float(), pooling) for map_NDhw in maps], dim=1)


def num_pooled_features(encoder: Encoder, *, pooling: str, blocks: int = 1) -> int:
    """D of `pooled_features`; with several blocks, found by running one black picture."""
    if blocks == 1 and pooling in POOLINGS:
        return encoder.num_features * POOLINGS[pooling].width
    size = encoder.backbone.input_size
    black = torch.zeros(1, 3, size, size, device=encoder.mean.device)
    with torch.inference_mode():
        return pooled_features(encoder, black, pooling=pooling, blocks=blocks).shape[1]


def num_head_features(encoder: Encoder, *, spatial: bool, pooling: str, blocks: int = 1) -> int:
    """D of what a head reads: a spatial one the map's features, any other the pooled ones."""
    if spatial:
        return encoder.num_features
    return num_pooled_features(encoder, pooling=pooling, blocks=blocks)
