"""Waiting for a database that is away: when to try again, who hears of it, when to give up.

One outage is one thing for all threads of a process: it begins with the first call that fails and
ends with the first that is answered. A person sees one line for each. After the limit, and after
Ctrl-C, nobody waits any more: what is still to be closed must not wait the same time again.
"""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from core.errors import InputError

from ..signals import check_stopped
from ..views.steps import duration

LIMIT_SECONDS = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries."""
SLICE = 0.25
"""Seconds after which a sleeper looks whether it is still to sleep."""


class OutageWatcher(Protocol):
    """Who wants to know that the storage is away: the live table."""

    def storage_away(self, seconds: float, reason: str) -> None:
        """Once when it begins (0 s), then after each further try that failed."""
        ...

    def storage_back(self, seconds: float) -> None:
        """It was away that long."""
        ...


class Outage:
    """The database's absences, one after the other.

    Args:
        where: the address as a person may see it.
        hint: what to do after the limit.
        limit: seconds of one absence that are waited for.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        *,
        where: str,
        hint: str,
        limit: float = LIMIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.watcher: OutageWatcher = PrintedLines()
        self._where = where
        self._hint = hint
        self._limit = limit
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._since: float | None = None
        self._ended = -math.inf
        self._patient = True
        self._jitter = random.Random()  # Of its own: a study's random numbers stay the same.

    def now(self) -> float:
        """When a try begins, for `wait` and `answered`."""
        return self._clock()

    def wait(self, attempt: int, reason: str, *, began: float) -> None:
        """After the failed try number `attempt` (from 0): returns when the next one is due.

        Raises InputError when the limit is reached.
        """
        with self._lock:
            now = self._clock()
            if self._since is None and began < self._ended:
                return  # Another thread heard meanwhile that it is over.
            begins = self._since is None
            since = now if self._since is None else self._since
            self._since = since
            away = now - since
            if away >= self._limit:
                self._patient = False
            patient = self._patient
        if not patient:
            raise InputError(
                f"the study's storage is away, for {duration(away)} now ({reason})",
                where=self._where,
                hint=self._hint,
            )
        if begins or attempt:
            self.watcher.storage_away(away, reason)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 10))
        self._pause(min(pause * self._jitter.uniform(0.7, 1.0), self._limit - away))

    def _pause(self, seconds: float) -> None:
        """Sleep, unless a signal ends that or somebody has lost patience."""
        end = self._clock() + seconds
        try:
            while self._patient and (left := end - self._clock()) > 0:
                self._sleep(min(left, SLICE))
                # While Tune's loop runs, a signal is only noted: it would end after our call.
                if threading.current_thread() is threading.main_thread():
                    check_stopped()
        except BaseException:
            self._patient = False
            raise

    def answered(self, *, began: float) -> None:
        """A try was answered: the outage, if it began before, is over."""
        if self._since is None:
            return
        with self._lock:
            since = self._since
            if since is None or began < since:
                return
            self._since, self._ended = None, self._clock()
            self._patient = True
        self.watcher.storage_back(self._ended - since)


class PrintedLines:
    """Tells a person by a line on standard error, where no live table does."""

    def storage_away(self, seconds: float, reason: str) -> None:
        if not seconds:
            print(away_line(reason), file=sys.stderr, flush=True)

    def storage_back(self, seconds: float) -> None:
        print(back_line(seconds), file=sys.stderr, flush=True)


def away_line(reason: str) -> str:
    return f"the study's storage is away ({reason}); the study waits for it and then goes on"


def back_line(seconds: float) -> str:
    return f"the study's storage is back after {duration(seconds)}"
