"""Where worker groups find the trials that they train, and where both sides leave word.

A worker group outlives its trials: it takes one after the other from this board. Rank 0 posts its
trial's progress and waits for an answer; the Tune trial that stands for it reads the progress,
reports it to Tune and answers. A trial is held by its group until it has an end, also when the
group's workers die and are started again. One Ray actor; nothing is decided here but retries.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from core.errors import NoRoomError
from core.report import Metrics, Outcome, Status

from .channel import beside_driver

RETRIES = 2
"""How often a trial whose workers died is taken up again."""
WAIT_SECONDS = 10.0
"""A question that has no answer by then is asked again."""
COULD_NOT_GO_ON = (Status.FAILED, Status.INFEASIBLE)
"""Ends that one rank alone may come to, while the others wait for it in vain."""

Job = Mapping[str, Any]
"""`cohort` (its name) and what `tuner.trials.worker_group.train_job` reads."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Rank 0 after an epoch."""

    epoch: int
    metrics: Metrics


End = Outcome | NoRoomError
"""An outcome; or a full disk, which ends the session and leaves the trial to the next one."""
Event = Progress | End
"""What a Tune trial hears of its trial; the end is the last."""


@dataclass(kw_only=True)
class _Posted:
    """A trial on the board."""

    job: Job
    group: str = ""
    """Who holds it; empty: nobody yet."""
    events: list[Event] = field(default_factory=list)
    answers: dict[int, bool] = field(default_factory=dict)
    """By epoch: whether to stop."""
    ended: dict[int, Outcome] = field(default_factory=dict)
    """By rank."""
    failures: int = 0
    abandoned: bool = False

    @property
    def over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], End)


class JobBoard:
    """The board. Its methods return at the latest after WAIT_SECONDS, most at once."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._posted: dict[str, _Posted] = {}
        self._queue: deque[str] = deque()
        self._closing = False
        self._full: NoRoomError | None = None
        self._changed = asyncio.Condition()

    # ---- the Tune trial -------------------------------------------------------------------

    async def submit(self, job: Job) -> None:
        """Post a trial; one that is posted already stays as it is."""
        if job["cohort"] not in self._posted:
            posted = self._posted[job["cohort"]] = _Posted(job=job)
            if self._full is not None:
                await self._end(posted, self._full)
                return
            self._queue.append(job["cohort"])
            await self._tell()

    async def events(self, cohort: str, seen: int) -> list[Event]:
        """What happened after the first `seen` events; waits for something."""
        posted = self._posted[cohort]
        await self._until(lambda: len(posted.events) > seen)
        return posted.events[seen:]

    async def answer(self, cohort: str, epoch: int, stop: bool) -> None:
        """The answer to what rank 0 posted after `epoch`."""
        self._posted[cohort].answers[epoch] = stop
        await self._tell()

    # ---- the host of a group --------------------------------------------------------------

    async def reserve(self, group: str) -> bool | None:
        """True once a trial is this group's, False when there is no more to do, None: ask again."""
        await self._until(lambda: self._no_more or self._held(group) or self._queue)
        if self._no_more:
            return False
        return True if self._hold(group) else None

    async def failed(self, group: str, reason: str) -> None:
        """The group's workers are dead. After RETRIES its trial has failed, with the reason."""
        posted = self._held(group)
        if posted is None:
            return
        if self._full is not None:
            await self._end(posted, self._full)
            return
        posted.failures += 1
        verdicts = [o for o in posted.ended.values() if o.status in COULD_NOT_GO_ON]
        if verdicts:
            await self._end(posted, verdicts[0])
        elif posted.failures > RETRIES:
            text = f"its workers failed {posted.failures} times, at last: {reason}"
            await self._end(posted, Outcome(status=Status.FAILED, reason=text))

    async def abandon(self, cohort: str) -> None:
        """Nobody follows the trial any more: it ends after its epoch, or does not begin."""
        if cohort in self._queue:
            self._queue.remove(cohort)
        if cohort in self._posted:
            self._posted[cohort].abandoned = True
        await self._tell()

    async def in_work(self) -> bool:
        """Whether some trial has begun and has no end."""
        return any(posted.group and not posted.over for posted in self._posted.values())

    async def close(self) -> None:
        """No trial begins any more, and those that run stop after their epoch."""
        self._closing = True
        await self._tell()

    # ---- the workers ----------------------------------------------------------------------

    async def take(self, group: str) -> str | None:
        """Rank 0: name of the trial to train; None when the group is no longer needed, and an
        empty name to ask again."""
        await self._until(lambda: self._no_more or self._held(group) or self._queue)
        if self._no_more:
            return None
        posted = self._hold(group)
        return posted.job["cohort"] if posted else ""

    async def job(self, cohort: str) -> Job:
        """Any rank: what to train."""
        return self._posted[cohort].job

    async def post(self, cohort: str, epoch: int, metrics: Metrics) -> bool:
        """Rank 0, after an epoch. An answer to the same epoch of an earlier run is void. True: the
        study ends, stop."""
        posted = self._posted[cohort]
        posted.answers.pop(epoch, None)
        posted.events.append(Progress(epoch=epoch, metrics=metrics))
        await self._tell()
        return self._stopping(posted)

    async def stops(self, cohort: str, epoch: int) -> bool | None:
        """Rank 0: whether to stop; None: ask again."""
        posted = self._posted[cohort]
        await self._until(lambda: self._stopping(posted) or epoch in posted.answers)
        return True if self._stopping(posted) else posted.answers.get(epoch)

    async def end(self, cohort: str, rank: int, outcome: Outcome) -> bool:
        """Any rank at its end; the trial's outcome is rank 0's. True: all ranks have ended; False:
        ask again."""
        posted = self._posted[cohort]
        posted.ended[rank] = outcome
        if rank == 0 and not posted.over:
            await self._end(posted, outcome)
        await self._tell()
        await self._until(lambda: len(posted.ended) == self._num_ranks)
        return len(posted.ended) == self._num_ranks

    async def no_room(self, cohort: str, error: NoRoomError) -> None:
        """Any rank: a disk is full. The trial has no outcome, and neither has any that would have
        begun; those of other groups go on to their end."""
        self._full = error
        self._queue.clear()
        for name, posted in self._posted.items():
            if not posted.over and (name == cohort or not posted.group):
                await self._end(posted, error)

    # ---- inside ---------------------------------------------------------------------------

    @property
    def _no_more(self) -> bool:
        """Whether no trial is to begin any more."""
        return self._closing or self._full is not None

    def _held(self, group: str) -> _Posted | None:
        """The group's trial that has no end yet."""
        found = [p for p in self._posted.values() if p.group == group and not p.over]
        return found[0] if found else None

    def _hold(self, group: str) -> _Posted | None:
        posted = self._held(group)
        if posted is None and self._queue:
            posted = self._posted[self._queue.popleft()]
            posted.group = group
        if posted is not None:
            posted.ended.clear()
        return posted

    def _stopping(self, posted: _Posted) -> bool:
        return self._closing or posted.abandoned

    async def _end(self, posted: _Posted, end: End) -> None:
        posted.events.append(end)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Callable[[], Any]) -> None:
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._changed:
                await self._changed.wait_for(holds)
        except TimeoutError:
            return


class BoardHandle:
    """The board as the driver, Tune trials and workers call it. Can be pickled."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, job: Job) -> None:
        self._ask("submit", job)

    def events(self, cohort: str) -> Iterator[Event]:
        """From the first one to the end, as they come."""
        seen = 0
        while True:
            for event in self._ask("events", cohort, seen):
                seen += 1
                yield event
                if isinstance(event, End):
                    return

    def answer(self, cohort: str, epoch: int, *, stop: bool) -> None:
        self._ask("answer", cohort, epoch, stop)

    def reserve(self, group: str) -> bool:
        """Wait for a trial for the group; False when there is no more to do."""
        while (found := self._ask("reserve", group)) is None:
            pass
        return bool(found)

    def failed(self, group: str, reason: str) -> None:
        self._ask("failed", group, reason)

    def abandon(self, cohort: str) -> None:
        self._ask("abandon", cohort)

    def in_work(self) -> bool:
        return bool(self._ask("in_work"))

    def close(self) -> None:
        self._ask("close")

    def take(self, group: str) -> str | None:
        """Wait for a trial; None when the group is no longer needed."""
        name: str | None = ""
        while name == "":
            name = self._ask("take", group)
        return name

    def job(self, cohort: str) -> Job:
        job: Job = self._ask("job", cohort)
        return job

    def report(self, cohort: str, epoch: int, metrics: Metrics, *, wait: bool) -> bool:
        """Post progress; whether to stop. If `wait`, the study is waited for."""
        stop: bool | None = self._ask("post", cohort, epoch, dict(metrics))
        if not wait:
            return bool(stop)
        while (stop := self._ask("stops", cohort, epoch)) is None:
            pass
        return bool(stop)

    def end(self, cohort: str, rank: int, outcome: Outcome, *, patience: float) -> bool:
        """Post a rank's outcome and wait, at most for about `patience` seconds, until all ranks
        have ended; whether they have."""
        give_up = time.monotonic() + patience
        while not self._ask("end", cohort, rank, outcome):
            if time.monotonic() > give_up:
                return False
        return True

    def no_room(self, cohort: str, error: NoRoomError) -> None:
        self._ask("no_room", cohort, error)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._actor, method).remote(*arguments))


def start_board(num_ranks: int) -> BoardHandle:
    """A new board for groups of so many workers; it ends with the driver."""
    return BoardHandle(ray.remote(**beside_driver())(JobBoard).remote(num_ranks))
