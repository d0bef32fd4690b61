"""Pooling of one stage and of several, against plain torch. N pictures, D features, h w spatial."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.encoding.backbones import Backbone
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.features import describe_features, encode, feature_shape
from core.encoding.pooling import (
    POOLINGS,
    num_head_features,
    num_pooled_features,
    pool,
    pooled_features,
)
from core.encoding.stages import as_map, has_channels_last
from core.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

N, SIZE = 2, 24
WIDTHS = (4, 6, 8, 10)


def _encoder() -> Encoder:
    """Four stages of convolution, ReLU and pooling, each a layer of its own."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return Encoder(Backbone(name="tiny", input_size=SIZE), nn.Sequential(*layers[:-1]))


def _images(seed: int = 0) -> Tensor:
    return torch.rand(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def _maps_by_hand(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """What enters each convolution but the first, and what leaves the last."""
    x = (images - encoder.mean) / encoder.std
    maps = []
    for place, layer in enumerate(encoder.network):
        if isinstance(layer, nn.Conv2d) and place:
            maps.append(x)
        x = layer(x)
    return [*maps, x]


def _plain(map_NDhw: Tensor, pooling: str) -> Tensor:
    average = F.adaptive_avg_pool2d(map_NDhw, 1).flatten(1)
    maximum = F.adaptive_max_pool2d(map_NDhw, 1).flatten(1)
    plain = {"avg": average, "max": maximum, "avg_max": torch.cat([average, maximum], 1)}
    assert plain.keys() == POOLINGS.keys()
    return plain[pooling]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_map_becomes_a_vector(pooling: str) -> None:
    features_NDhw = torch.rand(2, 5, 3, 4)
    pooled = pool(features_NDhw, pooling)
    assert pooled.shape == (2, 5 * POOLINGS[pooling].width)
    torch.testing.assert_close(pooled, _plain(features_NDhw, pooling))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_last_stages_lie_side_by_side(pooling: str, blocks: int) -> None:
    encoder = _encoder()
    with torch.no_grad():
        maps = _maps_by_hand(encoder, _images())[-blocks:]
        found = pooled_features(encoder, _images(), pooling=pooling, blocks=blocks)
    assert [m.shape[1] for m in maps] == list(WIDTHS[-blocks:])
    torch.testing.assert_close(found, torch.cat([_plain(m, pooling) for m in maps], 1))
    assert num_pooled_features(encoder, pooling=pooling, blocks=blocks) == found.shape[1]
    assert feature_shape(encoder, pooling, blocks) == (found.shape[1],)
    assert num_head_features(encoder, spatial=True, pooling=pooling, blocks=blocks) == WIDTHS[-1]


def test_features_of_several_stages_are_encoded_and_kept_apart() -> None:
    encoder = _encoder()
    pictures = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
    images = torch.from_numpy(pictures / 255.0).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        maps = _maps_by_hand(encoder, images)[-2:]
    expected = torch.cat([_plain(m, "avg_max") for m in maps], 1)
    found = encode(encoder, pictures, pooling="avg_max", blocks=2)
    torch.testing.assert_close(found, expected)
    keys = {
        describe_features(encoder, pictures="abc", pooling=pooling, blocks=blocks, view=view).key
        for pooling in POOLINGS
        for blocks in (1, 2)
        for view in ("plain", "mirrored")
    }
    assert len(keys) == 4 * len(POOLINGS)


def test_the_gradient_reaches_every_stage_read() -> None:
    encoder = _encoder()
    pooled_features(encoder, _images(), pooling="avg", blocks=4)[:, : WIDTHS[0]].sum().backward()
    reached = [
        any(bool(p.grad.abs().sum() > 0) for p in stage.parameters()) for stage in encoder.stages()
    ]
    assert reached == [True, False, False, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_reads_its_own_stages(copied) -> None:
    encoder = _encoder()
    other = copied(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        expected = torch.cat(
            [_plain(m, "max") for m in _maps_by_hand(other, _images())[-3:]], dim=1
        )
        found = pooled_features(other, _images(), pooling="max", blocks=3)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


def test_threads_do_not_read_each_others_maps() -> None:
    encoder = _encoder()
    with torch.no_grad():
        expected = [
            pooled_features(encoder, _images(seed), pooling="avg", blocks=4) for seed in range(4)
        ]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(30):
            with torch.no_grad():
                found = pooled_features(encoder, _images(seed), pooling="avg", blocks=4)
            if not torch.allclose(found, expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_more_blocks_than_stages_are_refused() -> None:
    with pytest.raises(InputError, match=r"blocks: tiny has 4 stages, .* last 5(.|\n)*1 to 4"):
        pooled_features(_encoder(), _images(), pooling="avg", blocks=5)
    pixels = build_encoder("ffn")
    assert num_pooled_features(pixels, pooling="avg") == pixels.num_features
    with pytest.raises(InputError, match=r"blocks: ffn has no stages(.|\n)*leave blocks at 1"):
        num_pooled_features(pixels, pooling="avg", blocks=2)
    with pytest.raises(InputError, match="unknown pooling 'sum'"):
        num_pooled_features(_encoder(), pooling="sum")


@pytest.mark.parametrize(
    ("shapes", "last"),
    [
        ([(2, 4, 12, 12), (2, 8, 6, 6)], False),
        ([(2, 6, 6, 6), (2, 8, 3, 3)], False),  # as many features as places a side
        ([(2, 6, 6, 6), (2, 3, 3, 8)], True),  # Swin at 384 px
        ([(2, 6, 6, 6)], False),
        ([(2, 7, 5), (2, 5)], False),
    ],
)
def test_where_a_network_has_its_features(shapes: list[tuple[int, ...]], last: bool) -> None:
    outputs = [torch.rand(shape) for shape in shapes]
    assert has_channels_last(outputs) == last
    for output in outputs:
        found = as_map(output, channels_last=last)
        axis = 1 if output.ndim in (2, 4) and not last else output.ndim - 1
        places = [a for a in range(1, output.ndim) if a != axis]
        expected = output.mean(places) if places else output
        torch.testing.assert_close(pool(found, "avg"), expected)


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4, 5\) is no feature map"):
        as_map(torch.rand(2, 3, 4, 4, 5), channels_last=False)


@pytest.mark.parametrize("name", ["swin_t", "timm/test_vit"])
def test_transformers_stages_keep_their_features(name: str) -> None:
    """Features last (Swin), and tokens: the stages before the last are as wide as its blocks."""
    encoder = build_encoder(name, weights="none", input_size=64)
    with torch.no_grad():
        maps = encoder.forward_blocks(torch.rand(1, 3, 64, 64), 3)
    widths = {"swin_t": [192, 384, 768], "timm/test_vit": [64, 64, 64]}[name]
    assert [m.shape[1] for m in maps] == widths
