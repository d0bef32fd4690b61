"""Stochastic depth: the probabilities that the builders themselves would give."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from core.encoding.networks import TimmNetwork, build_torchvision, cut_head
from core.finetuning.drop_path import set_drop_path

# Name -> the probability that its builder was written with. EfficientNets count otherwise than the
# rest, and MaxViT has several layers a block.
TORCHVISION = {
    "convnext_tiny": 0.1,
    "convnext_base": 0.5,
    "efficientnet_b0": 0.2,
    "efficientnet_v2_s": 0.2,
    "swin_t": 0.2,
    "swin_v2_s": 0.3,
    "maxvit_t": 0.2,
}
TIMM = ("vit_tiny_patch16_224", "convnext_atto", "resnet18", "efficientnet_b0", "levit_128s")


def torchvision_probabilities(network: nn.Module) -> list[float]:
    return [m.p for m in network.modules() if isinstance(m, StochasticDepth)]


@pytest.mark.parametrize(("name", "probability"), TORCHVISION.items())
def test_torchvision_gets_what_its_builder_gives(name: str, probability: float) -> None:
    with torch.device("meta"):
        network = models.get_model(name, weights=None)
    expected = torchvision_probabilities(network)
    assert set_drop_path(network, 0.9) == len(expected) > 10
    assert torchvision_probabilities(network) != pytest.approx(expected)
    set_drop_path(network, probability)
    assert torchvision_probabilities(network) == pytest.approx(expected, abs=1e-12)


def test_every_torchvision_file_with_the_layer_is_checked_above() -> None:
    files = {models.get_model_builder(n).__module__ for n in models.list_models(module=models)}
    assert len(files) > 10
    with_layer = {f for f in files if "StochasticDepth(" in inspect.getsource(sys.modules[f])}
    assert with_layer == {models.get_model_builder(n).__module__ for n in TORCHVISION}


def test_a_network_without_its_head_is_set_alike() -> None:
    network = cut_head(build_torchvision("convnext_tiny", 64))
    assert set_drop_path(network, 0.5) == 18
    assert torchvision_probabilities(network) == pytest.approx([0.5 * i / 17 for i in range(18)])


@pytest.mark.parametrize("name", TIMM)
def test_timm_gets_what_its_builder_gives(name: str) -> None:
    import timm
    from timm.layers import DropPath

    def probabilities(model: nn.Module) -> dict[str, float]:
        return {n: m.drop_prob for n, m in model.named_modules() if isinstance(m, DropPath)}

    network = TimmNetwork(name, 224)
    size = sum(p.numel() for p in network.parameters())
    with torch.device("meta"):
        expected = probabilities(timm.create_model(name, num_classes=0, drop_path_rate=0.37))
    assert set_drop_path(network, 0.37) == len(expected) > 5
    assert probabilities(network.model) == expected
    assert sum(p.numel() for p in network.parameters()) == size
    assert all(not p.is_meta for p in network.parameters())
    assert set_drop_path(network, 0.1) == len(expected)
    assert max(probabilities(network.model).values()) <= 0.1 + 1e-6
    set_drop_path(network, 0.0)
    assert set(probabilities(network.model).values()) == {0.0}


def test_it_acts_in_training_mode_alone(one_thread: None) -> None:
    torch.manual_seed(0)
    network = TimmNetwork("vit_tiny_patch16_224", 224).eval()
    image = torch.rand(1, 3, 224, 224)
    before = network(image)
    set_drop_path(network, 0.9)
    network.eval()
    assert torch.equal(network(image), before)
    network.train()
    assert not torch.equal(network(image), before)


def test_a_seed_gives_the_same_numbers_whether_or_not_it_was_set() -> None:
    network = TimmNetwork("resnet18", 64)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    set_drop_path(network, 0.2)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("network", [models.resnet18, lambda: TimmNetwork("vgg11", 64)])
def test_nothing_is_set_where_there_is_nothing(network: object) -> None:
    assert callable(network)
    assert set_drop_path(network(), 0.5) == 0
