"""Writes for a server that may be away: one thread does them in order, each until it is answered.

A write that fails for a reason that may pass is tried again, without limit and with growing pauses;
those behind it wait. A write that is refused for good is kept for whoever asks, and the rest goes
on. The thread takes time that others leave: who trains on the same cores comes first. Nothing here
is on disk: who puts writes in can make them anew. A write must be harmless when it is done twice,
as the answer to the first may have been lost.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

Answer = TypeVar("Answer")

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0
"""Seconds between two tries: doubled from the first to the longest."""
NICENESS = 10
"""Of the writing thread; of 19 at most, where programs have 0."""


@dataclass(frozen=True, kw_only=True)
class Away:
    """A server that does not answer."""

    since: float
    """`time.time()` of the first try that failed."""
    waiting: int
    """Writes that wait, the one that failed among them."""
    error: Exception
    """Why the last try failed."""


@dataclass(frozen=True, kw_only=True)
class _Write:
    job: Callable[[], object]
    essential: bool
    """Without it none of the others makes sense."""


class Delivery:
    """Does writes in the order in which they are put. The thread starts with the first.

    Args:
        may_pass: whether an error is worth another try.
        on_change: hears, in the writing thread, that the server is away, and None when it answers
            again.
    """

    def __init__(
        self, may_pass: Callable[[Exception], bool], on_change: Callable[[Away | None], None]
    ) -> None:
        self.refused: list[Exception] = []
        """Errors of writes that will never succeed, oldest first."""
        self.troubled = False
        """Whether any try failed: an answer may have been lost."""
        self._may_pass = may_pass
        self._on_change = on_change
        self._state = threading.Condition()
        self._hurry = threading.Event()
        self._writes: deque[_Write] = deque()
        self._failure: tuple[float, Exception] | None = None
        self._answered = time.monotonic()
        self._closing = False
        self._given_up = False
        self._working = False

    @property
    def away(self) -> Away | None:
        """None while the server answers."""
        with self._state:
            if self._failure is None:
                return None
            since, error = self._failure
            return Away(since=since, waiting=len(self._writes), error=error)

    @property
    def waiting(self) -> int:
        """Writes that are not done yet."""
        return len(self._writes)

    def put(self, job: Callable[[], object], *, essential: bool = False) -> None:
        """To be done after all that was put before. Nothing after `give_up`."""
        with self._state:
            if self._given_up:
                return
            self._writes.append(_Write(job=job, essential=essential))
            self._closing = False
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="delivery", daemon=True).start()
            self._state.notify_all()

    def ask(self, question: Callable[[], Answer], *, limit: float) -> Answer:
        """What `question` returns or raises, in its turn among the writes.

        Raises TimeoutError after `limit` seconds without any answer.
        """
        answers: list[Answer] = []
        errors: list[Exception] = []

        def job() -> None:
            try:
                answers.append(question())
            except Exception as error:
                if self._may_pass(error):
                    raise
                errors.append(error)

        self.put(job)
        if not self.wait(limit) or not (answers or errors):
            raise TimeoutError
        if errors:
            raise errors[0]
        return answers[0]

    def wait(self, limit: float, *, strict: bool = False) -> bool:
        """Wait until all is done; False after `limit` seconds without an answer.

        A write that takes long while the server answers is waited for, unless `strict`.
        """
        began = time.monotonic()
        self._hurry.set()
        with self._state:
            while self._writes:
                quiet = time.monotonic() - max(began, self._answered)
                if quiet > limit and (strict or self._failure is not None):
                    return False
                self._state.wait(0.2)
        return not self._given_up

    def settled(self) -> bool:
        """Wait until the first writes are done or fail: False where the server is away."""
        with self._state:
            while self._writes and self._failure is None:
                self._state.wait(0.2)
            return self._failure is None

    def give_up(self) -> None:
        """Leave undone what waits, and all that is put later."""
        with self._state:
            self._given_up = True
            self._writes.clear()
            self._state.notify_all()
        self._hurry.set()

    def close(self, limit: float) -> None:
        """End the thread after what waits, or after `limit` seconds without an answer."""
        if not self.wait(limit):
            self.give_up()
        with self._state:
            self._closing = True
            self._state.notify_all()

    # ---- the writing thread ---------------------------------------------------------------

    def _work(self) -> None:
        _step_back()
        while True:
            with self._state:
                while not self._writes:
                    if self._closing or self._given_up:
                        self._working = False
                        return
                    self._state.wait()
                write = self._writes[0]
            refusal = self._persist(write.job)
            with self._state:
                if self._writes and self._writes[0] is write:
                    self._writes.popleft()
                self._answered = time.monotonic()
                self._state.notify_all()
            if refusal is not None:
                self.refused.append(refusal)
                if write.essential:
                    self.give_up()

    def _persist(self, job: Callable[[], object]) -> Exception | None:
        """Do a job, however often it takes; its error if it is refused for good."""
        pause = FIRST_PAUSE
        while not self._given_up:
            started = time.time()
            try:
                job()
            except Exception as error:
                if not self._may_pass(error):
                    self._note(None)
                    return error
                self._note((self._failure or (started, error))[0], error)
            else:
                self._note(None)
                return None
            self._hurry.clear()
            self._hurry.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        return None

    def _note(self, since: float | None, error: Exception | None = None) -> None:
        """Keep whether the server is away, and tell where that changes."""
        with self._state:
            was_away = self._failure is not None
            self._failure = None if since is None or error is None else (since, error)
            self.troubled = self.troubled or self._failure is not None
            is_away = self._failure is not None
            self._state.notify_all()
        if is_away != was_away:
            self._on_change(self.away)


def _step_back() -> None:
    """Let others' threads go before this one, where threads have a priority of their own."""
    if sys.platform != "linux":
        return
    me = threading.get_native_id()
    with suppress(OSError):  # Some sandboxes do not have it.
        os.setpriority(os.PRIO_PROCESS, me, max(NICENESS, os.getpriority(os.PRIO_PROCESS, me)))
