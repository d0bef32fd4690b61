"""What one worker does for the features of a study.

It finds what is missing, then computes its part. Everything is looked at before anything is
computed: weights that are missing, and a disk that is too small, are said at once; a backbone whose
features are all there is not built again; and a picture is decoded once for all input sizes that
lack it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from core.encoding.features import (
    PIXELS,
    compute_features,
    describe_features,
    feature_shape,
    feature_store,
)
from core.encoding.shards import ShardedMatrix
from core.errors import InputError
from core.images.pixels import Fetched, PixelSpec, PixelStore
from core.images.views import BY_NAME, see

from ..trials.context import Context, FeatureRequest, build_backbone
from .cache import check_room

if TYPE_CHECKING:
    import torch

    from core.encoding.encoders import Encoder

Share = tuple[int, int]
"""(i, n): worker i's part of n, which is the shards whose number leaves i when divided by n."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What this worker has to do for one request. Its stores are in use while it lives."""

    request: FeatureRequest
    matrix: ShardedMatrix
    """What the request asks for."""
    pixels: PixelStore
    """The pictures it is computed from."""
    precision: str
    shards: tuple[int, ...]
    """This worker's, as far as they are missing."""


class FeatureWork:
    """A worker's part of all requests of a study."""

    def __init__(self, context: Context, share: Share = (0, 1)) -> None:
        self.parts: list[Part] = []
        self._context = context
        self._share = share
        self._pixels: dict[PixelSpec, PixelStore] = {}

    def add(self, request: FeatureRequest, encoder: Encoder, weights: str | None = None) -> Part:
        """Look at what there is of a request; damaged shards count as missing. `weights`: the
        encoder's fingerprint, if it is known."""
        pixels = self._pixel_store(encoder)
        if request.pooling == PIXELS:
            matrix, precision = pixels.matrix, ""
        else:
            spec = describe_features(
                encoder,
                pictures=self._context.pictures,
                pooling=request.pooling,
                blocks=request.blocks,
                view=request.view,
                precision=self._context.precision,
                weights=weights,
            )
            precision = spec.precision
            matrix = feature_store(
                self._context.cache,
                spec,
                num_images=self._context.table.num_images,
                row_shape=feature_shape(encoder, request.pooling, request.blocks),
            )
        part = Part(
            request=request,
            matrix=matrix,
            pixels=pixels,
            precision=precision,
            shards=tuple(_missing(matrix, self._share)),
        )
        self.parts.append(part)
        return part

    def compute(
        self,
        part: Part,
        encoder: Encoder,
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Do one part. Raises InputError for a picture that cannot be read, for features that are
        not finite and for a disk that is full."""
        if part.request.pooling == PIXELS:
            part.pixels.fill(part.shards, progress, lambda shard: self._others(part, shard))
            return
        view = BY_NAME[part.request.view]

        def pictures_of(shard: int) -> Fetched:
            fetched = part.pixels.fetch(shard, self._others(part, shard))
            return replace(fetched, read=lambda rows: see(fetched.read(rows), view))

        try:
            compute_features(
                encoder,
                part.matrix,
                pooling=part.request.pooling,
                blocks=part.request.blocks,
                precision=part.precision,
                pictures_of=pictures_of,
                shards=part.shards,
                device=device,
                progress=progress,
            )
        except FloatingPointError as error:
            raise InputError(
                f"{part.request.label} gives features that are not finite",
                hint="its weights may be damaged; or leave this backbone out",
            ) from error

    def missing_bytes(self) -> int:
        """What the disk still has to give for all requests, whichever worker computes them."""
        wanted: dict[PixelSpec, set[int]] = {}
        total = 0
        for part in self.parts:
            missing = part.matrix.missing_shards()
            wanted.setdefault(part.pixels.spec, set()).update(missing)
            if part.request.pooling != PIXELS:
                total += part.matrix.bytes_of(missing)
        for spec, shards in wanted.items():
            matrix = self._pixels[spec].matrix
            total += matrix.bytes_of(shards.intersection(matrix.missing_shards()))
        return total

    def _pixel_store(self, encoder: Encoder) -> PixelStore:
        spec = PixelSpec(
            pictures=self._context.pictures,
            input_size=encoder.backbone.input_size,
            resize=encoder.backbone.resize,
        )
        if spec not in self._pixels:
            self._pixels[spec] = PixelStore(
                self._context.cache,
                spec,
                self._context.table.paths,
                num_threads=self._context.num_threads,
            )
        return self._pixels[spec]

    def _others(self, part: Part, shard: int) -> list[PixelStore]:
        """The stores of other sizes that some part reads this shard of."""
        specs = {other.pixels.spec for other in self.parts if shard in other.shards}
        return [self._pixels[spec] for spec in sorted(specs, key=str) if spec != part.pixels.spec]


def plan_work(context: Context, requests: Iterable[FeatureRequest], share: Share) -> FeatureWork:
    """Look at all requests, and at the disk.

    Raises InputError for weights that are not at hand, fewer stages than a request reads, or a
    disk without room for what is missing.
    """
    from core.encoding.encoders import weights_fingerprint

    work = FeatureWork(context, share)
    for group in _by_encoder(requests):
        encoder = build_backbone(context, group[0])
        weights = weights_fingerprint(encoder)
        for request in group:
            encoder.check_blocks(request.blocks)
            work.add(request, encoder, weights)
    if share[0] == 0:
        check_room(context.cache, work.missing_bytes())
    return work


def do_work(
    context: Context,
    work: FeatureWork,
    *,
    device: torch.device | str = "cpu",
    progress_of: Callable[[FeatureRequest], Progress | None] = lambda request: None,
) -> None:
    """Compute all parts, with one encoder in memory at a time: a space has many views of it.
    Raises what `FeatureWork.compute` does."""
    parts = {part.request: part for part in work.parts if part.shards}
    for group in _by_encoder(parts):
        encoder = build_backbone(context, group[0])
        for request in group:
            progress = progress_of(request)
            work.compute(parts[request], encoder, device=device, progress=progress)


def ensure_features(
    context: Context,
    request: FeatureRequest,
    encoder: Encoder,
    *,
    device: torch.device | str = "cpu",
    share: Share = (0, 1),
    progress: Progress | None = None,
) -> ShardedMatrix:
    """The features (or decoded pictures) of one request, those that are missing computed."""
    work = FeatureWork(context, share)
    part = work.add(request, encoder)
    if part.shards:
        work.compute(part, encoder, device=device, progress=progress)
    return part.matrix


def _by_encoder(requests: Iterable[FeatureRequest]) -> Iterator[list[FeatureRequest]]:
    """Sorted requests that read the same backbone at the same size."""
    groups = groupby(sorted(requests), key=lambda request: (request.backbone, request.image_size))
    return (list(group) for _, group in groups)


def _missing(matrix: ShardedMatrix, share: Share) -> list[int]:
    worker, num_workers = share
    mine = [s for s in range(matrix.num_shards) if s % num_workers == worker]
    matrix.verify(mine)
    return [shard for shard in mine if not matrix.has(shard)]
