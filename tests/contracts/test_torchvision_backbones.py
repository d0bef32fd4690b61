"""Torchvision's classifiers as encoders: each has a record, builds, and loses its head alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from core.encoding.backbones import IMAGENET_MEAN, IMAGENET_STD, find_backbone
from core.encoding.encoders import build_encoder
from core.encoding.networks import build_torchvision, cut_head

from .small_backbones import (
    ALL_TORCHVISION,
    SIZES,
    assert_close,
    every,
    pictures_of,
    shared_encoder,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _dense(model: nn.Module, features: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.avgpool(features).flatten(1))
    return logits


# How each family turns the features into logits: read off torchvision's own forward methods.
CLASSIFY: dict[str, Callable[..., Tensor]] = {
    "alexnet": _dense,
    "vgg16": _dense,
    "convnext_tiny": lambda m, f: m.classifier(m.avgpool(f)),
    "densenet121": lambda m, f: m.classifier(f.mean((2, 3))),
    "efficientnet_b0": lambda m, f: m.classifier(f.mean((2, 3))),
    "googlenet": lambda m, f: m.fc(f.mean((2, 3))),
    "inception_v3": lambda m, f: m.fc(f.mean((2, 3))),
    "maxvit_t": lambda m, f: m.classifier(f),
    "mnasnet0_5": lambda m, f: m.classifier(f.mean((2, 3))),
    "mobilenet_v2": lambda m, f: m.classifier(f.mean((2, 3))),
    "mobilenet_v3_small": lambda m, f: m.classifier(f.mean((2, 3))),
    "regnet_x_400mf": lambda m, f: m.fc(f.mean((2, 3))),
    "resnet50": lambda m, f: m.fc(f.mean((2, 3))),
    "shufflenet_v2_x0_5": lambda m, f: m.fc(f.mean((2, 3))),
    "squeezenet1_1": lambda m, f: m.classifier(f).flatten(1),
    "swin_t": lambda m, f: m.head(f.mean((2, 3))),
    "swin_v2_t": lambda m, f: m.head(f.mean((2, 3))),
    "vit_b_32": lambda m, f: m.heads(f),
}


@pytest.mark.parametrize("name", every(CLASSIFY))
def test_the_cut_network_and_the_head_give_the_whole_network_s_logits(name: str) -> None:
    size = SIZES[name] or find_backbone(name).input_size
    with torch.random.fork_rng(devices=[]):
        model = build_torchvision(name, size).eval()
        for parameter in model.parameters():
            if not parameter.any():  # a head of zeros would prove nothing
                nn.init.normal_(parameter, std=0.1)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = CLASSIFY[name](model, cut_head(model)(images))
        assert_close(logits, model(images))


def test_every_torchvision_classifier_has_a_record() -> None:
    assert set(ALL_TORCHVISION) == set(models.list_models(module=models))
    assert len(ALL_TORCHVISION) >= 80
    for name in ALL_TORCHVISION:
        backbone = find_backbone(name)
        preprocessing = models.get_model_weights(name).DEFAULT.transforms()
        assert backbone.input_size == preprocessing.crop_size[0] >= 224
        assert all(0 < s < 1 for s in (*backbone.mean, *backbone.std))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_TORCHVISION)
def test_every_torchvision_classifier_builds(name: str) -> None:
    encoder = build_encoder(name, weights="none")
    assert encoder.num_features >= 256
    assert encoder.backbone.spatial == find_backbone(name).spatial
    held = {id(p) for stage in encoder.stages() for p in stage.parameters()}
    assert held == {id(p) for p in encoder.parameters()}


def test_inception_reads_what_torchvision_feeds_its_pretrained_network() -> None:
    """torchvision normalises for ImageNet and turns that back with `transform_input`."""
    encoder = shared_encoder("inception_v3")
    with torch.random.fork_rng(devices=[]):
        whole = models.inception_v3(weights=None, transform_input=True, init_weights=False).eval()
    whole.load_state_dict(encoder.network.state_dict(), strict=False)
    seen: list[Tensor] = []
    whole.Mixed_7c.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = pictures_of(encoder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        whole((images - mean) / std)
        assert_close(encoder(images), seen[0])
