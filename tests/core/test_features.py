"""Features are computed once: the key covers what changes them, and what is there is not redone.

Also decoded pictures (`core.images.pixels`), which features are computed from. N pictures, D
features, P places.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from core.encoding import shards
from core.encoding.backbones import Backbone
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.features import (
    MAP,
    FeatureSpec,
    compute_features,
    describe_features,
    encode,
    feature_shape,
    feature_store,
)
from core.encoding.shards import ShardedMatrix
from core.errors import InputError
from core.images import pixels
from core.images.pictures import decode_square, open_picture
from core.images.pixels import PixelSpec, PixelStore
from core.precision import BFLOAT16, FLOAT32

pytestmark = pytest.mark.usefixtures("one_thread")

NUM, SIZE, D, SHARD = 10, 16, 6, 4  # shards of 4, 4 and 2 rows


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    names = [folder / f"{row}.png" for row in range(NUM)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(name)
    return names


def _encoder(seed: int = 0, name: str = "tiny") -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, D, 3, stride=2)
        )
    return Encoder(Backbone(name=name, input_size=SIZE), network)


def _count_pictures(encoder: Encoder) -> list[int]:
    """Sizes of the encoder's forward passes from now on."""
    sizes: list[int] = []
    encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes


def _count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the calls that decode pictures from now on."""
    sizes: list[int] = []
    decode = pixels.decode_pictures

    def counting(paths: list[Path], squares: Any, **settings: Any) -> list[pixels.Pictures]:
        sizes.append(len(paths))
        return decode(paths, squares, **settings)

    monkeypatch.setattr(pixels, "decode_pictures", counting)
    return sizes


def _pixel_store(cache: Path, paths: list[Path]) -> PixelStore:
    spec = PixelSpec(pictures="abc", input_size=SIZE, resize="squash")
    return PixelStore(cache, spec, paths)


def _ensure(
    cache: Path,
    encoder: Encoder,
    paths: list[Path],
    *,
    pooling: str = "avg",
    precision: str = FLOAT32,
    device: str = "cpu",
) -> ShardedMatrix:
    """What a worker does: compute what is missing."""
    store = feature_store(
        cache,
        describe_features(encoder, pictures="abc", pooling=pooling, precision=precision),
        num_images=len(paths),
        row_shape=feature_shape(encoder, pooling),
    )
    compute_features(
        encoder,
        store,
        pooling=pooling,
        precision=precision,
        pictures_of=_pixel_store(cache, paths).fetch,
        shards=store.missing_shards(),
        device=device,
        batch_size=3,
    )
    return store


def _plain_features(encoder: Encoder, paths: list[Path]) -> torch.Tensor:
    """The feature maps [N, D, h, w], picture by picture."""
    with torch.no_grad():
        return torch.cat(
            [
                encoder(
                    torch.from_numpy(decode_square(open_picture(path), SIZE) / 255.0)
                    .float()
                    .permute(2, 0, 1)[None]
                )
                for path in paths
            ]
        )


def test_features_are_those_of_each_picture_in_order(tmp_path: Path, paths: list[Path]) -> None:
    encoder = _encoder()
    map_NDhw = _plain_features(encoder, paths)
    for pooling, expected in (("avg", map_NDhw.mean((2, 3))), ("max", map_NDhw.amax((2, 3)))):
        matrix = _ensure(tmp_path, encoder, paths, pooling=pooling).open()
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["avg", "max", MAP])
def test_bfloat16_features_are_close_and_kept_apart(
    tmp_path: Path, paths: list[Path], pooling: str
) -> None:
    """Products have 8 bits of precision; what is kept has the type of float32's."""
    encoder = _encoder()
    exact = _ensure(tmp_path, encoder, paths, pooling=pooling)
    rounded = _ensure(tmp_path, encoder, paths, pooling=pooling, precision=BFLOAT16)
    assert rounded.folder != exact.folder
    assert rounded.dtype == exact.dtype
    assert not np.array_equal(rounded.open(), exact.open())
    np.testing.assert_allclose(rounded.open(), exact.open(), atol=0.03)


def test_maps_hold_the_places_that_pooled_features_come_from(
    tmp_path: Path, paths: list[Path]
) -> None:
    encoder = _encoder()
    map_NPD = _ensure(tmp_path, encoder, paths, pooling=MAP).open()
    assert map_NPD.dtype == np.float16
    assert map_NPD.shape == (NUM, *feature_shape(encoder, MAP))
    assert map_NPD.shape[1:] == (9, D)
    expected = _plain_features(encoder, paths).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(map_NPD, expected, rtol=2e-3, atol=1e-3)
    map_NPD = map_NPD.astype(np.float32)
    for pooling, pooled in (("avg", map_NPD.mean(1)), ("max", map_NPD.max(1))):
        matrix = _ensure(tmp_path, encoder, paths, pooling=pooling).open()
        np.testing.assert_allclose(matrix, pooled, rtol=2e-3, atol=1e-3)


def test_no_picture_passes_the_backbone_twice(tmp_path: Path, paths: list[Path]) -> None:
    encoder = _encoder()
    passed = _count_pictures(encoder)
    store = _ensure(tmp_path, encoder, paths)
    assert passed == [3, 1, 3, 1, 2]  # batches of at most 3 within shards of 4, 4 and 2
    passed.clear()
    _ensure(tmp_path, encoder, paths)
    assert passed == []
    (store.folder / "shards" / "000001.json").unlink()
    _ensure(tmp_path, encoder, paths)
    assert sum(passed) == SHARD  # of the one shard that was lost


def test_a_second_backbone_of_the_same_size_decodes_nothing(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _count_decoded(monkeypatch)
    first, second = _encoder(), _encoder(seed=1, name="other")
    _ensure(tmp_path, first, paths)
    assert decoded == [4, 4, 2]
    passed = _count_pictures(second)
    matrix = _ensure(tmp_path, second, paths).open()
    assert decoded == [4, 4, 2]
    assert sum(passed) == NUM
    expected = _plain_features(second, paths).mean((2, 3))
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_are_known_together_are_cut_from_one_decoding(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _count_decoded(monkeypatch)
    squares = [(SIZE, "squash"), (24, "squash"), (24, "crop")]
    stores = [
        PixelStore(tmp_path, PixelSpec(pictures="abc", input_size=size, resize=resize), paths)
        for size, resize in squares
    ]
    stores[1].shard(1)  # A kill left this one shard of one size.
    assert decoded == [4]
    stores[0].fill([0, 1, 2], others_of=lambda shard: stores)
    assert decoded == [4, 4, 4, 2]
    for store, (size, resize) in zip(stores, squares, strict=True):
        assert store.matrix.missing_shards() == []
        expected = [decode_square(open_picture(path), size, resize=resize) for path in paths]
        assert np.array_equal(store.matrix.open(), np.stack(expected))
        assert np.array_equal(store.shard(2), np.stack(expected[8:]))
    assert decoded == [4, 4, 4, 2]


def test_a_damaged_shard_of_pictures_never_reaches_a_backbone(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _pixel_store(tmp_path, paths)
    store.fill([0, 1, 2])
    writable = np.load(store.matrix.folder / "matrix.npy", mmap_mode="r+")
    writable[5] ^= 255
    writable.flush()
    decoded = _count_decoded(monkeypatch)
    encoder = _encoder()
    matrix = _ensure(tmp_path, encoder, paths).open()
    assert decoded == [4]
    expected = _plain_features(encoder, paths).mean((2, 3))
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)


def test_two_poolings_and_two_backbones_share_nothing_but_pictures(
    tmp_path: Path, paths: list[Path]
) -> None:
    for encoder in (_encoder(), _encoder(seed=1)):
        for pooling in ("avg", "max", MAP):
            _ensure(tmp_path, encoder, paths, pooling=pooling)
    assert len(list((tmp_path / "features").iterdir())) == 6
    assert len(list((tmp_path / "pixels").iterdir())) == 1


SPECS = [
    FeatureSpec(
        pictures="a",
        backbone="b",
        weights="c",
        input_size=16,
        resize="squash",
        pooling="avg",
        precision="float32",
        dtype="float32",
    ),
    PixelSpec(pictures="a", input_size=16, resize="squash"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_the_key_changes_with_every_field(spec: FeatureSpec | PixelSpec) -> None:
    keys = {spec.key}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        changed = value + 1 if isinstance(value, int) else value + "x"
        keys.add(dataclasses.replace(spec, **{field.name: changed}).key)
    assert len(keys) == len(dataclasses.fields(spec)) + 1
    assert dataclasses.replace(spec).key == spec.key


def test_the_spec_is_read_off_the_encoder() -> None:
    encoder, ffn = _encoder(), build_encoder("ffn")
    of_pixels = describe_features(ffn, pictures="abc", pooling="avg", precision=BFLOAT16)
    assert of_pixels.precision == FLOAT32
    halved = describe_features(encoder, pictures="abc", pooling="avg", precision=BFLOAT16)
    assert halved.precision == BFLOAT16
    spec = describe_features(encoder, pictures="abc", pooling="avg")
    assert (spec.pictures, spec.backbone, spec.pooling) == ("abc", "tiny", "avg")
    assert (spec.input_size, spec.resize, spec.dtype) == (SIZE, "squash", "float32")
    assert describe_features(_encoder(), pictures="abc", pooling="avg").key == spec.key
    assert spec.precision == FLOAT32
    changed = _encoder()
    with torch.no_grad():
        changed.network[0].weight[0, 0, 0, 0] += 1e-6
    assert describe_features(changed, pictures="abc", pooling="avg").key != spec.key


def test_a_training_encoder_is_put_in_evaluation_mode(tmp_path: Path, paths: list[Path]) -> None:
    encoder = _encoder().train()
    before = encoder.network[1].running_mean.clone()
    _ensure(tmp_path, encoder, paths)
    assert not encoder.training
    assert torch.equal(encoder.network[1].running_mean, before)


@pytest.mark.parametrize("are_decoded", [True, False])
def test_pictures_of_the_next_shard_are_read_meanwhile_and_decoded_in_turn(
    tmp_path: Path, paths: list[Path], are_decoded: bool
) -> None:
    """In the order asked for, and away from the main thread where they need only be read."""
    encoder = _encoder()
    store = feature_store(
        tmp_path,
        describe_features(encoder, pictures="abc", pooling="avg"),
        num_images=NUM,
        row_shape=feature_shape(encoder, "avg"),
    )
    stored_when_read: list[tuple[int, int]] = []
    pixel_store = _pixel_store(tmp_path, paths)
    in_main_thread: list[bool] = []

    def pictures_of(shard: int) -> pixels.Fetched:
        in_main_thread.append(threading.current_thread() is threading.main_thread())
        stored_when_read.append((shard, NUM // SHARD + 1 - len(store.missing_shards())))
        return pixel_store.fetch(shard)

    seen: list[tuple[int, int]] = []
    compute_features(
        encoder,
        store,
        pooling="avg",
        precision=FLOAT32,
        pictures_of=pictures_of,
        are_decoded=lambda shard: are_decoded,
        shards=[2, 0, 1],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [shard for shard, _ in stored_when_read] == [2, 0, 1]
    # The first is waited for in any case.
    assert in_main_thread == [True, not are_decoded, not are_decoded]
    # One shard may be in work, and one on its way to the disk.
    assert [stored >= place - 2 for place, (_, stored) in enumerate(stored_when_read)] == [True] * 3
    assert seen == [(2, NUM), (6, NUM), (10, NUM)]
    assert not pixel_store.matrix.missing_shards()


def test_a_picture_that_cannot_be_read_ends_the_work_and_keeps_the_rest(
    tmp_path: Path, paths: list[Path]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    mixed = [*paths[:5], broken, *paths[6:]]
    with pytest.raises(InputError, match=r"broken\.png: this is not a picture"):
        _ensure(tmp_path, _encoder(), mixed)
    passed = _count_pictures(encoder := _encoder())
    _ensure(tmp_path, encoder, paths)
    assert sum(passed) == NUM - SHARD  # the first shard was kept


def test_what_cannot_be_written_is_said_also_for_the_last_shard(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are written in a thread, and nobody waits for it but the end."""
    write = ShardedMatrix.write_shard

    def failing(self: ShardedMatrix, shard: int, values: np.ndarray) -> None:
        if self.folder.parent.name == "features" and shard == 2:
            raise InputError("the disk is full")
        write(self, shard, values)

    monkeypatch.setattr(ShardedMatrix, "write_shard", failing)
    with pytest.raises(InputError, match="the disk is full"):
        _ensure(tmp_path, _encoder(), paths)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)
    passed = _count_pictures(encoder := _encoder())
    _ensure(tmp_path, encoder, paths)
    assert sum(passed) == NUM - 2 * SHARD


def test_features_that_are_not_finite_are_refused(tmp_path: Path, paths: list[Path]) -> None:
    encoder = _encoder()
    with torch.no_grad():
        encoder.network[3].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        _ensure(tmp_path, encoder, paths)


def test_decoded_pictures_are_kept_and_filled_once(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _count_decoded(monkeypatch)
    store = _pixel_store(tmp_path, paths)
    first = store.shard(1)
    again = store.shard(1)
    assert np.array_equal(again, first)
    assert again.flags.writeable  # torch warns of memory that is not
    assert decoded == [4]
    seen: list[tuple[int, int]] = []
    store.fill(store.matrix.missing_shards(), lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]
    assert decoded == [4, 4, 2]
    expected = np.stack([decode_square(open_picture(path), SIZE) for path in paths])
    assert np.array_equal(store.matrix.open(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_features_of_the_cpu(tmp_path: Path, paths: list[Path]) -> None:
    """Between two requests the encoder stays on the device that computed the first."""
    encoder = _encoder()
    for pooling in ("avg", MAP):
        expected = _ensure(tmp_path / "cpu", _encoder(), paths, pooling=pooling).open()
        matrix = _ensure(tmp_path / "gpu", encoder, paths, pooling=pooling, device="cuda").open()
        np.testing.assert_allclose(matrix, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pooling", ["avg", "max", MAP])
def test_encoding_in_batches_is_encoding_at_once(pooling: str) -> None:
    encoder = _encoder()
    pictures = np.random.default_rng(0).integers(0, 256, (NUM, SIZE, SIZE, 3), dtype=np.uint8)
    whole = encode(encoder, pictures, pooling=pooling)
    parts = [
        encode(encoder, pictures[start : start + 3], pooling=pooling) for start in (0, 3, 6, 9)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
