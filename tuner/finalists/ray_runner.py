"""Jobs of the finalists on Ray: a task each, as many at once as fit, with their progress shown.

Fine-tunings take what a fine-tuning trial takes; where that is several workers, Ray Train groups
train them (`tuner.trials.worker_group`), and the task only stands for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from core.errors import InputError

from ..trials.channel import ChannelHandle, start_channel
from ..trials.cluster import Share, Workers
from ..trials.context import Context
from ..views.steps import Steps, showing_steps
from .repeats import MAILBOX, Job, Payload, Work, context_of, follow_job

if TYPE_CHECKING:
    from rich.console import Console

POLL_SECONDS = 0.2


class RayRunner:
    """A `tuner.finalists.repeats.Runner`. Ray starts a task anew if its worker dies.

    Args:
        context: what every job gets.
        workers: of the study.
        share: what a fine-tuning trial takes of the cluster.
        console: shows progress.
    """

    def __init__(self, context: Context, workers: Workers, share: Share, console: Console) -> None:
        self._context = context
        self._workers = workers
        self._share = share
        self._console = console

    def __call__(
        self, work: Work, payloads: Sequence[Payload], totals: Mapping[str, int]
    ) -> list[Any]:
        channel = start_channel()
        results: dict[int, Any] = {}
        with showing_steps(self._console) as steps:
            progress = _Progress(steps, totals)
            places = range(len(payloads))
            tunes = [p for p in places if isinstance(payloads[p], Job) and payloads[p].finetunes]
            others = [p for p in places if p not in tunes]
            # Not side by side: a group keeps its cores until it has no more to do.
            results |= self._run(work, {p: payloads[p] for p in others}, channel, progress)
            if tunes:
                jobs = {p: payloads[p] for p in tunes}
                results |= self._finetune(work, jobs, channel, progress)
        for result in results.values():
            if isinstance(result, InputError):
                raise result
        return [results[place] for place in places]

    def _run(
        self,
        work: Work,
        payloads: Mapping[int, Payload],
        channel: ChannelHandle,
        progress: _Progress,
    ) -> dict[int, Any]:
        import ray

        task: Any = ray.remote(num_cpus=self._workers.cpus, num_gpus=self._workers.gpus)(work)
        context = ray.put(self._context)
        tasks = {place: task.remote(context, p, channel) for place, p in payloads.items()}
        return _wait(tasks, channel, progress)

    def _finetune(
        self, work: Work, jobs: Mapping[int, Job], channel: ChannelHandle, progress: _Progress
    ) -> dict[int, Any]:
        workers = self._workers.for_trials(self._share)
        context = dataclasses.replace(
            self._context, num_threads=workers.num_threads, memory_share=workers.memory_share
        )
        if workers.per_trial == 1:
            runner = RayRunner(context, workers, self._share, self._console)
            return runner._run(work, jobs, channel, progress)
        import ray

        from ..trials.job_board import start_board
        from ..trials.worker_group import worker_groups

        board = start_board(workers.per_trial)
        first = next(iter(jobs.values())).repeats[0]  # All of a call see the same rows.
        count = min(workers.count, len(jobs))
        workers = dataclasses.replace(workers, count=count)
        task: Any = ray.remote(num_cpus=0)(follow_job)
        with worker_groups(context_of(context, first), workers, board):
            tasks = {p: task.remote(context, job, channel, board) for p, job in jobs.items()}
            return _wait(tasks, channel, progress)


class _Progress:
    """Sums what the jobs of a step have done."""

    def __init__(self, steps: Steps, totals: Mapping[str, int]) -> None:
        self._steps = steps
        self._totals = totals
        self._done: dict[str, dict[int, int]] = {step: {} for step in totals}

    def __call__(self, item: tuple[int, str, int]) -> None:
        place, step, done = item
        if self._done[step].get(place) == done:
            return
        self._done[step][place] = done
        self._steps(step, sum(self._done[step].values()), self._totals[step])


def _wait(tasks: Mapping[int, Any], channel: ChannelHandle, progress: _Progress) -> dict[int, Any]:
    """The result of each task; raises what a task raised as soon as it has."""
    import ray

    results: dict[int, Any] = {}
    left = {task: place for place, task in tasks.items()}
    while left:
        ready, _ = ray.wait(list(left), timeout=POLL_SECONDS)
        for item in channel.collect(MAILBOX):
            progress(item)
        for task in ready:
            results[left.pop(task)] = ray.get(task)
    for item in channel.collect(MAILBOX):
        progress(item)
    return results
