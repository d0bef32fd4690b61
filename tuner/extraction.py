"""Features before trials: every backbone of a study sees every view of a picture once, ever.

The work is cut into shards; worker i of n checks and computes the shards whose number leaves i
when divided by n, so that any number of workers can share it and a killed run goes on where it
stopped. One worker runs as a plain Ray task, several as Ray Train workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from core.errors import InputError
from core.shards import ShardedMatrix

from .channel import ChannelHandle
from .context import Context, FeatureRequest, build_backbone, prepare_worker

if TYPE_CHECKING:
    import torch

    from core.encoders import Encoder

MAILBOX = "extraction"
PROGRESS_SECONDS = 0.3
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class ExtractionProgress:
    """How far one worker is with one request."""

    worker: int
    label: str
    done: int
    """Pictures of its part that are done."""
    total: int
    """Pictures of its part that were missing."""


Watch = Callable[[ExtractionProgress], None]


def ensure_features(
    context: Context,
    request: FeatureRequest,
    encoder: Encoder,
    *,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> ShardedMatrix:
    """The feature matrix (or decoded pictures) of a request, after checking the shards that are
    there and computing those that are not. `share` = (i, n): worker i's part of n."""
    from core.features import (
        PIXELS,
        compute_features,
        describe_features,
        feature_shape,
        feature_store,
    )
    from core.pixels import Pictures, PixelSpec, PixelStore
    from core.views import BY_NAME, see

    pixel_spec = PixelSpec(
        pictures=context.pictures,
        input_size=encoder.backbone.input_size,
        resize=encoder.backbone.resize,
    )
    pixels = PixelStore(context.cache, pixel_spec, context.table.paths)
    if request.pooling == PIXELS:
        pixels.fill(_missing(pixels.matrix, share), progress)
        return pixels.matrix
    spec = describe_features(
        encoder,
        pictures=context.pictures,
        pooling=request.pooling,
        blocks=request.blocks,
        view=request.view,
        precision=context.precision,
    )
    store = feature_store(
        context.cache,
        spec,
        num_images=context.table.num_images,
        row_shape=feature_shape(encoder, request.pooling, request.blocks),
    )
    view = BY_NAME[request.view]

    def pictures_of(shard: int) -> Pictures:
        return see(pixels.shard(shard), view)

    shards = _missing(store, share)
    if shards:
        compute_features(
            encoder,
            store,
            pooling=request.pooling,
            blocks=request.blocks,
            precision=spec.precision,
            pictures_of=pictures_of,
            shards=shards,
            device=device,
            progress=progress,
        )
    return store


def extract(
    context: Context,
    requests: Sequence[FeatureRequest],
    channel: ChannelHandle,
    *,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    watch: Watch,
) -> dict[FeatureRequest, str]:
    """Compute what is missing of all requests; returns the folder of each matrix.

    `watch` hears progress. Raises InputError if weights are missing or a picture is damaged.
    """
    job = {"context": context, "requests": sorted(requests), "channel": channel}
    if num_workers == 1:
        task = ray.remote(num_cpus=cpus_per_worker, num_gpus=gpus_per_worker)(_extract_alone)
    else:
        task = ray.remote(num_cpus=0)(_extract_together)
        job |= {"num_workers": num_workers, "cpus": cpus_per_worker, "gpus": gpus_per_worker}
    folders: dict[FeatureRequest, str] = {}
    running = task.remote(job)
    while True:
        ready, _ = ray.wait([running], timeout=POLL_SECONDS)
        for item in channel.collect(MAILBOX):
            if isinstance(item, ExtractionProgress):
                watch(item)
            elif isinstance(item, InputError):
                raise item
            else:
                folders |= item
        if ready:
            ray.get(running)
            return folders


def _extract_alone(job: dict[str, Any]) -> None:
    _extract_share(job, (0, 1))


def _extract_together(job: dict[str, Any]) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": job["cpus"], **({"GPU": job["gpus"]} if job["gpus"] else {})}
    TorchTrainer(
        _extraction_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=job["num_workers"],
            use_gpu=bool(job["gpus"]),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"extraction-{time.time_ns()}",
            storage_path=str(job["context"].folder / "train"),
        ),
    ).fit()


def _extraction_loop(job: dict[str, Any]) -> None:
    from ray import train

    worker = train.get_context()
    _extract_share(job, (worker.get_world_rank(), worker.get_world_size()))


def _extract_share(job: dict[str, Any], share: tuple[int, int]) -> None:
    """All encoders are built before any is used: missing weights are said at once. One encoder is
    kept while requests ask for it, as the views of a space are many. A mistake goes to the driver
    through the channel, where Ray would wrap it in a worker's traceback."""
    context: Context = job["context"]
    channel: ChannelHandle = job["channel"]
    device = prepare_worker(context)
    try:
        for request in {(r.backbone, r.image_size, r.blocks): r for r in job["requests"]}.values():
            build_backbone(context, request)
        built = None
        for request in job["requests"]:
            if built != (request.backbone, request.image_size):
                encoder = build_backbone(context, request)
                built = (request.backbone, request.image_size)
            progress = _Throttle(channel, share[0], request.label)
            store = ensure_features(
                context, request, encoder, device=device, share=share, progress=progress
            )
            if share[0] == 0:
                channel.deliver(MAILBOX, {request: str(store.folder)})
    except InputError as error:
        channel.deliver(MAILBOX, error)


class _Throttle:
    """A `core` progress callable that passes news on a few times a second."""

    def __init__(self, channel: ChannelHandle, worker: int, label: str) -> None:
        self._channel = channel
        self._worker = worker
        self._label = label
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        self._channel.deliver(
            MAILBOX,
            ExtractionProgress(worker=self._worker, label=self._label, done=done, total=total),
        )


def _missing(matrix: ShardedMatrix, share: tuple[int, int]) -> list[int]:
    worker, num_workers = share
    mine = [s for s in range(matrix.num_shards) if s % num_workers == worker]
    matrix.verify(mine)
    return [shard for shard in mine if not matrix.has(shard)]
