"""What every backbone promises, over the registry and one small network of each family.

Legend: N pictures, D features, h w spatial.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core.encoding.backbones import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, find_backbone
from core.encoding.encoders import build_encoder, load_encoder, weights_fingerprint
from core.encoding.pooling import pool
from core.errors import InputError

from .small_backbones import (
    ALL_TORCHVISION,
    SIZES,
    TRAINABLE,
    assert_close,
    every,
    pictures_of,
    shared_encoder,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_registry_and_every_family_of_torchvision_are_covered() -> None:
    families = {name.split("_")[0].rstrip("0123456789") for name in ALL_TORCHVISION}
    covered = {name.split("_")[0].rstrip("0123456789") for name in SIZES}
    # Wide and grouped ResNets are ResNets; `densenet121` and its like lose their digits above.
    assert families - covered == {"resnext", "wide"}
    assert set(BACKBONES) <= set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_features_have_the_measured_shape_and_stages_hold_every_parameter_once(name: str) -> None:
    encoder = shared_encoder(name)
    with torch.no_grad():
        features_NDhw = encoder(pictures_of(encoder))
    assert features_NDhw.shape[:2] == (2, encoder.num_features)
    assert (features_NDhw.shape[2] * features_NDhw.shape[3] > 1) == encoder.backbone.spatial
    assert torch.isfinite(features_NDhw).all()
    assert not torch.equal(features_NDhw[0], features_NDhw[1])
    held = [id(p) for stage in encoder.stages() for p in stage.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in encoder.parameters()}
    assert len(encoder.stages()) >= 3 or not encoder.backbone.trainable


@pytest.mark.parametrize("name", every(SIZES))
def test_features_repeat_and_do_not_depend_on_the_batch(name: str) -> None:
    encoder = shared_encoder(name)
    images = pictures_of(encoder)
    with torch.no_grad():
        first, again, alone = encoder(images), encoder(images), encoder(images[1:])
    assert torch.equal(first, again)
    assert_close(alone, first[1:])


@pytest.mark.parametrize("name", every(SIZES))
def test_an_exported_encoder_loads_with_equal_features(name: str, tmp_path: Path) -> None:
    encoder = shared_encoder(name)
    spec = json.loads(json.dumps(encoder.export(tmp_path)))
    loaded = load_encoder(tmp_path, spec)
    images = pictures_of(encoder)
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))
    assert loaded.backbone == encoder.backbone
    assert weights_fingerprint(loaded) == weights_fingerprint(encoder)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_reach_the_unfrozen_stages_only(name: str) -> None:
    encoder = shared_encoder(name)
    images = pictures_of(encoder)
    for num_unfrozen in (1, len(encoder.stages())):
        encoder.requires_grad_(False)
        for stage in encoder.stages()[-num_unfrozen:]:
            stage.requires_grad_(True)
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        wanted = {id(p) for s in encoder.stages()[-num_unfrozen:] for p in s.parameters()}
        reached = {id(p) for p in encoder.parameters() if p.grad is not None}
        assert reached == wanted
    encoder.zero_grad()


def test_stages_are_the_resolutions_of_a_network_and_the_blocks_of_a_transformer() -> None:
    resnet, vgg, vit = (shared_encoder(n) for n in ("resnet50", "vgg16", "vit_b_32"))
    network = resnet.network
    expected = [
        [network.conv1, network.bn1],
        *([getattr(network, f"layer{i}")] for i in range(1, 5)),
    ]
    assert [list(stage) for stage in resnet.stages()] == expected  # type: ignore[call-overload]
    assert [len(stage) for stage in vgg.stages()] == [2, 2, 3, 3, 3]  # type: ignore[arg-type]
    assert len(vit.stages()) == 1 + 12


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet5O", "resnet50"),
        ("ResNet-50", "resnet50"),
        ("inceptionv3", "inception_v3"),
        ("timm/resnet_18", "timm/resnet18"),
        ("", "valid: ffn"),
        ("timm/", "timm/NAME"),
        ("onnx/", "onnx/FILE"),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(name: str, close: str) -> None:
    with pytest.raises(InputError, match=f"unknown backbone '{name}'(.|\n)*{close}"):
        find_backbone(name)


def test_random_weights_come_from_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    prints = [
        weights_fingerprint(build_encoder("mnasnet0_5", weights="none", seed=s, input_size=32))
        for s in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert prints[0] == prints[1] != prints[2]


def test_the_encoder_normalises_and_ffn_is_the_picture() -> None:
    encoder = build_encoder("ffn")
    images = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert encoder.num_features == 3 * 48 * 48
    assert encoder.stages() == []
    torch.testing.assert_close(encoder(images)[:, :, 0, 0], ((images - mean) / std).flatten(1))


def test_pooling() -> None:
    features_NDhw = torch.rand(2, 5, 3, 4)
    expected = F.adaptive_avg_pool2d(features_NDhw, 1).flatten(1)
    torch.testing.assert_close(pool(features_NDhw, "avg"), expected)
    expected = F.adaptive_max_pool2d(features_NDhw, 1).flatten(1)
    torch.testing.assert_close(pool(features_NDhw, "max"), expected)
    with pytest.raises(InputError, match="pooling: unknown pooling 'sum'"):
        pool(features_NDhw, "sum")


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_last_stages_have_maps_that_end_in_the_features(name: str) -> None:
    """As many as every family has; each with a map of its own, the last being the encoder's."""
    encoder = shared_encoder(name)
    images = pictures_of(encoder)
    with torch.no_grad():
        maps = encoder.forward_blocks(images, 3)
        assert torch.equal(maps[-1], encoder(images))
        (alone,) = encoder.forward_blocks(images, 1)
    assert torch.equal(alone, maps[-1])
    assert len(maps) == 3
    for map_NDhw in maps:
        assert map_NDhw.ndim == 4
        assert len(map_NDhw) == len(images)
        assert torch.isfinite(map_NDhw).all()
    sizes = [m.shape[2] * m.shape[3] for m in maps]
    assert sizes == sorted(sizes, reverse=True)
    assert not torch.equal(maps[0][0], maps[0][1])


@pytest.mark.parametrize(
    ("name", "size"), [("squeezenet1_1", 16), ("vit_b_32", 100), ("timm/test_vit", 7)]
)
def test_a_size_that_a_network_cannot_read_is_refused(name: str, size: int) -> None:
    with pytest.raises(InputError, match=rf"image_size: {name} cannot read .*{size} px(.|\n)*own"):
        build_encoder(name, weights="none", input_size=size)
