"""Features of frozen backbones: computed once for each picture set, kept, and shared.

Content-addressed (`core.encoding.shards`): a key covers everything that changes the values, which
is picture bytes and their order, size, resizing, view, backbone, weights, pooling and type.
N pictures, D features, P places of a map.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..images.pictures import DECODING
from ..images.pixels import Fetched, Pictures, Progress
from ..images.views import PLAIN
from ..precision import FLOAT32, autocast
from .encoders import Encoder, weights_fingerprint
from .pooling import num_pooled_features, pooled_features
from .shards import ShardedMatrix, content_key
from .streams import num_streams, streams

FloatArray = npt.NDArray[Any]
T = TypeVar("T")

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
    shards: Sequence[int],
    device: torch.device | str = "cpu",
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> None:
    """Fill some shards of a feature matrix. On a CPU several batches go through the backbone side
    by side, each decoded by the thread that computes it (`core.encoding.streams`); for another
    device pictures are decoded ahead by threads of their own. What is there already is written
    meanwhile.

    Args:
        encoder: frozen; moved to `device` and put in evaluation mode.
        store: the matrix to fill.
        pooling: see `core.encoding.pooling.POOLINGS`; or `map`.
        blocks: stages that pooled features are taken from.
        precision: see `core.precision`.
        pictures_of: shard -> its uint8 pictures [n, size, size, 3], in the view wanted.
        shards: which ones, in this order.
        batch_size: pictures a forward pass.
        progress: called with (pictures done, pictures to do) from the calling thread.
    """
    encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
    sizes = {
        shard: store.shard_rows(shard).stop - store.shard_rows(shard).start for shard in shards
    }
    count = num_streams(encoder, device)
    on_cpu = torch.device(device).type == "cpu"
    done, total = 0, sum(sizes.values())
    buffers = _Buffers(encoder.backbone.input_size, batch_size, device)

    def compute(read: Callable[[], Pictures], out: FloatArray) -> int:
        pictures = read()
        features = encode(
            encoder,
            pictures,
            pooling=pooling,
            blocks=blocks,
            precision=precision,
            device=device,
            out=buffers.own()[: len(pictures)],
        )
        out[:] = features.cpu().numpy()
        return len(pictures)

    with streams(count) as pool, _decoding_ahead(on_cpu) as ahead, _writing_behind() as write:

        def begin(shard: int) -> _ShardInWork:
            fetched = pictures_of(shard)
            values = np.empty((sizes[shard], *store.shape[1:]), store.dtype)
            parts = [slice(i, i + batch_size) for i in range(0, sizes[shard], batch_size)]
            reads = [ahead(partial(fetched.read, rows)) for rows in parts]
            batches = [
                pool.submit(compute, read, values[rows])
                for read, rows in zip(reads, parts, strict=True)
            ]
            return _ShardInWork(shard=shard, values=values, keep=fetched.keep, batches=batches)

        # The next shard is begun before one is waited for, so that no stream is ever idle.
        for work in _one_ahead(shards, begin):
            for batch in work.batches:
                done += batch.result()
                if progress is not None:
                    progress(done, total)
            write(work.keep)
            write(partial(store.write_shard, work.shard, work.values))


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


@dataclass(frozen=True, kw_only=True)
class _ShardInWork:
    """A shard whose batches are on their way."""

    shard: int
    values: FloatArray
    keep: Callable[[], None]
    """Writes the shard's pictures, once all batches are done."""
    batches: Sequence[Future[int]]


class _Buffers(threading.local):
    """A place for the floats of a batch, one a thread: to ask for 19 MB again and again costs the
    system."""

    def __init__(self, size: int, batch_size: int, device: torch.device | str) -> None:
        self._make = partial(
            torch.empty,
            (batch_size, 3, size, size),
            device=device,
            memory_format=torch.channels_last,
        )
        self._images: Tensor | None = None

    def own(self) -> Tensor:
        if self._images is None:
            self._images = self._make()
        return self._images


def _one_ahead(shards: Iterable[int], begin: Callable[[int], T]) -> Iterator[T]:
    """`begin` of each shard, and of the one after it before it is given out."""
    begun: deque[T] = deque()
    for shard in shards:
        begun.append(begin(shard))
        if len(begun) == 2:
            yield begun.popleft()
    yield from begun


@contextmanager
def _decoding_ahead(on_cpu: bool) -> Iterator[Callable[[Callable[[], T]], Callable[[], T]]]:
    """Yields a function that has a job done in a thread, and returns what waits for its result.
    Streams on a CPU do their own jobs when it is their turn: they have all cores already."""
    if on_cpu:
        yield lambda job: job
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as readers:
        try:
            yield lambda job: readers.submit(job).result
        finally:
            readers.shutdown(cancel_futures=True)


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
