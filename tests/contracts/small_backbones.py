"""One small network of each family of backbones, for the tests of what they promise."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from core.encoding.backbones import BACKBONES, list_backbones
from core.encoding.encoders import Encoder, build_encoder

# Smaller than the networks' own size, where they allow it, to be quick.
SIZES: dict[str, int | None] = {
    "ffn": 16,
    "vgg16": 64,
    "resnet50": 64,
    "inception_v3": 96,
    "efficientnet_b0": 64,
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "googlenet": 64,
    "maxvit_t": None,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_32": 64,
    "timm/test_resnet": 64,
    "timm/test_convnext": 64,
    "timm/test_efficientnet": 64,
    "timm/test_vit": 64,
}
# `make test` proves every promise of the registry's backbones and of one other a library; of the
# other families it runs one picture, and the slow tests do the rest.
QUICK = {*BACKBONES, "mobilenet_v2", "timm/test_convnext", "timm/test_vit"}


def every(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


TRAINABLE = every(name for name in SIZES if name != "ffn")
ALL_TORCHVISION = [name for name in list_backbones() if name != "ffn"]


@functools.cache
def shared_encoder(name: str) -> Encoder:
    return build_encoder(name, weights="none", input_size=SIZES[name])


def pictures_of(encoder: Encoder, num_images: int = 2) -> Tensor:
    size = encoder.backbone.input_size
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(features: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32: random networks' features may be of any size."""
    scale = expected.abs().max()
    torch.testing.assert_close(features / scale, expected / scale, rtol=1e-3, atol=1e-5)
