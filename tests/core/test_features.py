"""Features are computed once: the key covers what changes them, and what is there is not redone.

Also decoded pictures (`core.images.pixels`), which features are computed from. N pictures, D
features, P places.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

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


def _note_passed(encoder: Encoder) -> list[int]:
    """Sizes of the encoder's forward passes from now on."""
    sizes: list[int] = []
    encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes


def _note_decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that are decoded from now on."""
    decoded: list[Path] = []
    open_one = pixels.open_picture

    def noting(path: Path) -> Image.Image:
        decoded.append(path)
        return open_one(path)

    monkeypatch.setattr(pixels, "open_picture", noting)
    return decoded


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
    passed = _note_passed(encoder)
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
    decoded = _note_decoded(monkeypatch)
    first, second = _encoder(), _encoder(seed=1, name="other")
    _ensure(tmp_path, first, paths)
    assert sorted(decoded) == sorted(paths)
    passed = _note_passed(second)
    matrix = _ensure(tmp_path, second, paths).open()
    assert len(decoded) == NUM
    assert sum(passed) == NUM
    expected = _plain_features(second, paths).mean((2, 3))
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_are_known_together_are_cut_from_one_decoding(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _note_decoded(monkeypatch)
    squares = [(SIZE, "squash"), (24, "squash"), (24, "crop")]
    stores = [
        PixelStore(tmp_path, PixelSpec(pictures="abc", input_size=size, resize=resize), paths)
        for size, resize in squares
    ]
    stores[1].fill([1])  # A kill left this one shard of one size.
    assert sorted(decoded) == sorted(paths[4:8])
    stores[0].fill([0, 1, 2], others_of=lambda shard: stores)
    assert sorted(decoded[4:]) == sorted(paths)
    for store, (size, resize) in zip(stores, squares, strict=True):
        assert store.matrix.missing_shards() == []
        expected = [decode_square(open_picture(path), size, resize=resize) for path in paths]
        assert np.array_equal(store.matrix.open(), np.stack(expected))
        assert np.array_equal(store.fetch(2).read(slice(None)), np.stack(expected[8:]))
    assert len(decoded) == 4 + NUM


def test_a_damaged_shard_of_pictures_never_reaches_a_backbone(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _pixel_store(tmp_path, paths)
    store.fill([0, 1, 2])
    writable = np.load(store.matrix.folder / "matrix.npy", mmap_mode="r+")
    writable[5] ^= 255
    writable.flush()
    decoded = _note_decoded(monkeypatch)
    encoder = _encoder()
    matrix = _ensure(tmp_path, encoder, paths).open()
    assert sorted(decoded) == sorted(paths[4:8])
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


@pytest.mark.parametrize("torch_threads", [1, 2, 3])
def test_any_number_of_streams_gives_the_same_features(
    tmp_path: Path, paths: list[Path], torch_threads: int
) -> None:
    """In the order asked for, with what is there written meanwhile, and torch's threads left as
    they were."""
    encoder = _encoder()
    store = feature_store(
        tmp_path,
        describe_features(encoder, pictures="abc", pooling="avg"),
        num_images=NUM,
        row_shape=feature_shape(encoder, "avg"),
    )
    stored_when_asked: list[tuple[int, int]] = []
    pixel_store = _pixel_store(tmp_path, paths)

    def pictures_of(shard: int) -> pixels.Fetched:
        stored_when_asked.append((shard, NUM // SHARD + 1 - len(store.missing_shards())))
        return pixel_store.fetch(shard)

    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        compute_features(
            encoder,
            store,
            pooling="avg",
            precision=FLOAT32,
            pictures_of=pictures_of,
            shards=[2, 0, 1],
            batch_size=3,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert torch.get_num_threads() == torch_threads
        new_thread: list[int] = []
        thread = threading.Thread(target=lambda: new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert new_thread == [torch_threads]
        torch.set_num_threads(1)
        alone = torch.cat(
            [
                encode(encoder, _squares(paths[i:j]), pooling="avg")
                for i, j in [(0, 3), (3, 4), (4, 7), (7, 8), (8, 10)]
            ]
        )
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(store.open(), alone)
    assert [shard for shard, _ in stored_when_asked] == [2, 0, 1]
    # Two shards may be in work, and one on its way to the disk.
    assert all(stored >= place - 3 for place, (_, stored) in enumerate(stored_when_asked))
    assert seen == [(2, NUM), (5, NUM), (6, NUM), (9, NUM), (10, NUM)]
    assert not pixel_store.matrix.missing_shards()


def test_pictures_are_normalised_alike_in_any_memory_order() -> None:
    encoder = _encoder()
    rng = np.random.default_rng(1)
    encoder.mean.copy_(torch.tensor([0.1, 0.4, 0.7]).view(3, 1, 1))
    encoder.std.copy_(torch.tensor([0.5, 1.5, 2.5]).view(3, 1, 1))
    images = torch.from_numpy(rng.random((2, 3, SIZE, SIZE + 2), dtype=np.float32))
    seen: list[torch.Tensor] = []
    encoder.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder(images)
        encoder(images.to(memory_format=torch.channels_last))
    expected = (images - encoder.mean) / encoder.std
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected)
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def _squares(paths: list[Path]) -> pixels.Pictures:
    return np.stack([decode_square(open_picture(path), SIZE) for path in paths])


def test_batches_pass_side_by_side_on_a_cpu(tmp_path: Path, paths: list[Path]) -> None:
    """The first two meet inside the network: one after the other, the barrier would break."""
    encoder = _encoder()
    store = feature_store(
        tmp_path,
        describe_features(encoder, pictures="abc", pooling="avg"),
        num_images=NUM,
        row_shape=feature_shape(encoder, "avg"),
    )
    barrier = threading.Barrier(2)
    met: list[int] = []

    def meet(module: object, inputs: object) -> None:
        if len(met) < 2:
            met.append(barrier.wait(timeout=30))

    encoder.register_forward_pre_hook(meet)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compute_features(
            encoder,
            store,
            pooling="avg",
            precision=FLOAT32,
            pictures_of=_pixel_store(tmp_path, paths).fetch,
            shards=[0, 1, 2],
            batch_size=4,
        )
    finally:
        torch.set_num_threads(before)
    assert sorted(met) == [0, 1]


def test_a_picture_that_cannot_be_read_ends_the_work_and_keeps_the_rest(
    tmp_path: Path, paths: list[Path]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    mixed = [*paths[:5], broken, *paths[6:]]
    with pytest.raises(InputError, match=r"broken\.png: this is not a picture"):
        _ensure(tmp_path, _encoder(), mixed)
    passed = _note_passed(encoder := _encoder())
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
    passed = _note_passed(encoder := _encoder())
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
    decoded = _note_decoded(monkeypatch)
    store = _pixel_store(tmp_path, paths)
    fetched = store.fetch(1)
    first = np.concatenate([fetched.read(slice(0, 3)), fetched.read(slice(3, 6))])
    fetched.keep()
    again = store.fetch(1).read(slice(None))
    assert np.array_equal(again, first)
    assert again.flags.writeable  # torch warns of memory that is not
    assert decoded == paths[4:8]
    seen: list[tuple[int, int]] = []
    store.fill(store.matrix.missing_shards(), lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]
    assert sorted(decoded) == sorted(paths)
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
