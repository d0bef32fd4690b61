"""Features of frozen backbones: computed once for each picture set, kept, and shared.

Content-addressed (`core.encoding.shards`): a key covers everything that changes the values, which
is picture bytes and their order, size, resizing, view, backbone, weights, pooling and type.
N pictures, D features, P places of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..images.pictures import DECODING
from ..images.pixels import Fetched, Pictures, Progress
from ..images.views import PLAIN
from ..precision import FLOAT32, autocast
from .encoders import Encoder, weights_fingerprint
from .pooling import num_pooled_features, pooled_features
from .shards import ShardedMatrix, content_key

MAP = "map"
"""The pooling of features that keep their places: [N, P, D] for csra heads."""
PIXELS = "pixels"
"""In the place of a pooling: the decoded pictures themselves, which fine-tuning reads."""
BATCH = 32
"""Pictures in one forward pass of a frozen backbone, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What a feature matrix is; the hash of this is its name in the cache."""

    pictures: str
    """Fingerprint of the picture contents, in the order of rows."""
    backbone: str
    weights: str
    """Fingerprint of the backbone's weights."""
    input_size: int
    resize: str
    pooling: str
    """See `core.encoding.pooling.POOLINGS`; or `map`."""
    precision: str
    """Type in which the backbone computes: see `core.precision`."""
    dtype: str
    """Type in which features are kept."""
    blocks: int = 1
    """Stages that pooled features are taken from."""
    view: str = PLAIN.name
    """How the backbone saw the pictures: see `core.images.views`."""
    decoding: int = DECODING
    """See `core.images.pictures.DECODING`."""

    @property
    def key(self) -> str:
        return content_key(asdict(self))


def describe_features(
    encoder: Encoder,
    *,
    pictures: str,
    pooling: str,
    blocks: int = 1,
    view: str = PLAIN.name,
    precision: str = FLOAT32,
    weights: str | None = None,
) -> FeatureSpec:
    """The spec of an encoder's features. Maps are kept in half precision: they are P times the
    size, and the head that reads them averages over places. A backbone that torch does not
    compute (ONNX, pixels) is float32 whatever `precision` says. `weights`: their fingerprint, if
    it is known."""
    return FeatureSpec(
        pictures=pictures,
        backbone=encoder.backbone.name,
        weights=weights_fingerprint(encoder) if weights is None else weights,
        input_size=encoder.backbone.input_size,
        resize=encoder.backbone.resize,
        pooling=pooling,
        precision=precision if encoder.backbone.trainable else FLOAT32,
        dtype="float16" if pooling == MAP else "float32",
        blocks=blocks,
        view=view,
    )


def feature_store(
    cache: Path, spec: FeatureSpec, *, num_images: int, row_shape: tuple[int, ...]
) -> ShardedMatrix:
    """The feature matrix of `spec` under `cache`, made empty if it is new."""
    return ShardedMatrix(
        cache / "features" / spec.key,
        spec=asdict(spec),
        num_rows=num_images,
        row_shape=row_shape,
        dtype=spec.dtype,
    )


def feature_shape(encoder: Encoder, pooling: str, blocks: int = 1) -> tuple[int, ...]:
    """Shape of one picture's features: (D,), or (P, D) for maps."""
    if pooling != MAP:
        return (num_pooled_features(encoder, pooling=pooling, blocks=blocks),)
    size = encoder.backbone.input_size
    with torch.inference_mode():
        map_NDhw = encoder(torch.zeros(1, 3, size, size, device=encoder.mean.device))
    return (map_NDhw.shape[2] * map_NDhw.shape[3], map_NDhw.shape[1])


def compute_features(
    encoder: Encoder,
    store: ShardedMatrix,
    *,
    pooling: str,
    blocks: int = 1,
    precision: str,
    pictures_of: Callable[[int], Fetched],
    are_decoded: Callable[[int], bool] = lambda shard: False,
    shards: Sequence[int],
    device: torch.device | str = "cpu",
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> None:
    """Fill some shards of a feature matrix. While one is computed, the next one's pictures are
    read in a thread, and what is there already is written in another. On a CPU pictures are not
    decoded meanwhile, but in turn: two jobs that both want all cores are slower side by side.

    Args:
        encoder: frozen; moved to `device` and put in evaluation mode.
        store: the matrix to fill.
        pooling: see `core.encoding.pooling.POOLINGS`; or `map`.
        blocks: stages that pooled features are taken from.
        precision: see `core.precision`.
        pictures_of: shard -> its uint8 pictures [n, size, size, 3], in the view wanted.
        are_decoded: shard -> whether its pictures need only be read.
        shards: which ones, in this order.
        batch_size: pictures a forward pass.
        progress: called with (pictures done, pictures to do).
    """
    encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
    total = sum(store.shard_rows(s).stop - store.shard_rows(s).start for s in shards)
    done = 0
    size = encoder.backbone.input_size
    # One place for the floats of all batches: to ask for 19 MB again and again costs the system.
    images = torch.empty(
        (batch_size, 3, size, size), device=device, memory_format=torch.channels_last
    )
    with _writing_behind() as write:
        on_cpu = torch.device(device).type == "cpu"
        ahead = are_decoded if on_cpu else lambda shard: True
        for shard, fetched in _in_order(shards, pictures_of, ahead):
            write(fetched.keep)
            pixels = fetched.pictures
            values = np.empty((len(pixels), *store.shape[1:]), store.dtype)
            for start in range(0, len(pixels), batch_size):
                batch = pixels[start : start + batch_size]
                features = encode(
                    encoder,
                    batch,
                    pooling=pooling,
                    blocks=blocks,
                    precision=precision,
                    device=device,
                    out=images[: len(batch)],
                )
                values[start : start + len(batch)] = features.cpu().numpy()
                done += len(batch)
                if progress is not None:
                    progress(done, total)
            write(partial(store.write_shard, shard, values))


@torch.inference_mode()
def encode(
    encoder: Encoder,
    pictures_NhwC: Pictures,
    *,
    pooling: str,
    blocks: int = 1,
    precision: str = FLOAT32,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Features of uint8 pictures [N, size, size, 3]: float32 [N, D], or [N, P, D] for `map`.
    `out`: takes the pictures as floats [N, 3, size, size] in channels_last; None for a new one."""
    # Permuted bytes are channels_last already; the division makes floats of them in one pass.
    images = torch.div(torch.from_numpy(pictures_NhwC).to(device).permute(0, 3, 1, 2), 255, out=out)
    with autocast(device, precision):
        if pooling != MAP:
            return pooled_features(encoder, images, pooling=pooling, blocks=blocks)
        map_NDhw: Tensor = encoder(images)
    return map_NDhw.float().flatten(2).transpose(1, 2)


def _in_order(
    shards: Sequence[int], read: Callable[[int], Fetched], ahead: Callable[[int], bool]
) -> Iterator[tuple[int, Fetched]]:
    """Each shard with what `read` gives for it: in a thread, while the one before is in use, if
    `ahead` says so, else when it is its turn."""
    with ThreadPoolExecutor(1) as reader:
        pending: Future[Fetched] | None = None
        for place, shard in enumerate(shards):
            current = read(shard) if pending is None else pending.result()
            following = shards[place + 1 : place + 2]
            pending = reader.submit(read, *following) if following and ahead(*following) else None
            yield shard, current


@contextmanager
def _writing_behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yields a function that does jobs in a thread and returns at once: checksums and disk take
    their time there. Only one job waits; what went wrong with one is raised by the next, or at the
    end of the block."""
    pending: list[Future[None]] = []

    def write(job: Callable[[], None]) -> None:
        if pending:
            pending.pop().result()
        pending.append(writer.submit(job))

    with ThreadPoolExecutor(1) as writer:
        yield write
        if pending:
            pending.pop().result()
