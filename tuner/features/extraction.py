"""Features before trials: every backbone of a study sees every view of a picture once, ever.

The work is cut into shards, and each worker has a part (`feature_work`), so that any number of
workers can share it and a killed run goes on where it stopped. One worker runs as a plain Ray
task, several as Ray Train workers. On several machines every node must see the pictures, the
weights, the cache and the study's folder under the same paths, on storage with file locks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray

from core.errors import InputError

from ..trials.channel import Answer, ChannelHandle
from ..trials.context import Context, FeatureRequest, prepare_worker
from .cache import holding

MAILBOX = "extraction"
PROGRESS_SECONDS = 0.3
POLL_SECONDS = 0.2
MAX_FAILURES = 3
"""Deaths of workers after which extraction gives up; each costs the shards in work."""
STOP_SECONDS = 60
"""How long workers may take to end after another one's mistake: they look up between batches."""
STOP: Answer = (0,)
"""To a worker: somebody met a mistake, end."""
HELD: Answer = (1,)
"""To the worker that told of the matrices: the driver holds them now."""


@dataclass(frozen=True, kw_only=True)
class ExtractionProgress:
    """How far one worker is with one request."""

    worker: int
    label: str
    done: int
    """Pictures of its part that are done."""
    total: int
    """Pictures of its part that were missing."""
    seconds: float = 0.0
    """Since it began with them."""
    decodes: bool = False
    """Whether it reads picture files for them."""


Watch = Callable[[ExtractionProgress], None]


def extract(
    context: Context,
    requests: Sequence[FeatureRequest],
    channel: ChannelHandle,
    *,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    watch: Watch,
    holds: ExitStack | None = None,
) -> dict[FeatureRequest, str]:
    """Compute what is missing of all requests; returns the folder of each matrix.

    Args:
        context: the study.
        requests: what its trials read.
        channel: a new one.
        num_workers: that share the work.
        cpus_per_worker: cores of each.
        gpus_per_worker: GPUs of each.
        watch: hears progress.
        holds: until it is closed, the matrices cannot be pruned; None to leave that open.

    Raises:
        InputError: weights are missing, a picture is damaged, or the disk has too little room.
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
                _stop(running, channel, num_workers)
                raise item
            else:
                folders |= item
                if holds is not None:
                    holds.enter_context(holding(folders.values()))
                channel.rule(MAILBOX, 0, HELD)
        if ready:
            ray.get(running)
            return folders


def _stop(running: Any, channel: ChannelHandle, num_workers: int) -> None:
    """Have all workers end, so that none works on behind the driver's back."""
    for worker in range(num_workers):
        channel.rule(MAILBOX, worker, STOP)
    ended, _ = ray.wait([running], timeout=STOP_SECONDS)
    if not ended:
        ray.cancel(running, force=True)


def _extract_alone(job: dict[str, Any]) -> None:
    _extract_share(job, (0, 1))


def _extract_together(job: dict[str, Any]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": job["cpus"], **({"GPU": job["gpus"]} if job["gpus"] else {})}
    storage = job["context"].folder / "train"
    name = f"extraction-{time.time_ns()}"
    try:
        TorchTrainer(
            _extraction_loop,
            train_loop_config=job,
            scaling_config=ScalingConfig(
                num_workers=job["num_workers"],
                use_gpu=bool(job["gpus"]),
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        ).fit()
    finally:
        # Only Train's own notes are there: what the workers made is in the cache.
        shutil.rmtree(storage / name, ignore_errors=True)


def _extraction_loop(job: dict[str, Any]) -> None:
    from ray import train

    worker = train.get_context()
    _extract_share(job, (worker.get_world_rank(), worker.get_world_size()))


def _extract_share(job: dict[str, Any], share: tuple[int, int]) -> None:
    """A mistake goes to the driver through the channel, where Ray would wrap it in a worker's
    traceback; the worker then ends as if all were well, as a second try would meet it again."""
    from .feature_work import do_work, plan_work

    context: Context = job["context"]
    line = _Line(job["channel"], share[0])
    device = prepare_worker(context)
    try:
        work = plan_work(context, job["requests"], share)
        parts = {part.request: part for part in work.parts}

        def progress_of(request: FeatureRequest) -> Callable[[int, int], None]:
            matrix, shards = parts[request].pixels.matrix, parts[request].shards
            decodes = any(not matrix.has(shard) for shard in shards)
            return line.progress_of(request, decodes=decodes)

        do_work(context, work, device=device, progress_of=progress_of)
        if share[0] == 0:
            folders = {part.request: str(part.matrix.folder) for part in work.parts}
            line.hand_over(folders)
    except InputError as error:
        line.deliver(error)
    except _StoppedError:
        return


class _StoppedError(Exception):
    """Another worker met a mistake."""


class _Line:
    """A worker's line to the driver."""

    def __init__(self, channel: ChannelHandle, worker: int) -> None:
        self._channel = channel
        self._worker = worker

    def deliver(self, item: object) -> None:
        self._channel.deliver(MAILBOX, item)

    def hand_over(self, folders: dict[FeatureRequest, str]) -> None:
        """Tell of the matrices, and come back when the driver holds them. This worker must hold
        them until then: nobody may remove one in between."""
        self.deliver(folders)
        while not self._is_held():
            time.sleep(POLL_SECONDS)

    def progress_of(self, request: FeatureRequest, *, decodes: bool) -> Callable[[int, int], None]:
        """A `core` progress callable that passes news on a few times a second, and raises
        _StoppedError if this worker is to end."""
        last = 0.0
        started = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done < total and now - last < PROGRESS_SECONDS:
                return
            last = now
            self.deliver(
                ExtractionProgress(
                    worker=self._worker,
                    label=request.label,
                    done=done,
                    total=total,
                    seconds=now - started,
                    decodes=decodes,
                )
            )
            self._is_held()

        return progress

    def _is_held(self) -> bool:
        answer = self._channel.ruling(MAILBOX, self._worker)
        if answer == STOP:
            raise _StoppedError
        return answer == HELD
