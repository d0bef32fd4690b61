"""SIGINT and SIGTERM while a study runs: the first saves and ends, a second one ends at once.

A person sends SIGINT, a machine that is about to go SIGTERM. The first raises `Interrupted`, a
KeyboardInterrupt, so that there is one way out; while Tune's loop runs, that ends in its own way
instead. What then still hangs (a server that is away, a worker in a long epoch) is left behind
after GRACE_SECONDS: what ended is on disk before anyone is told, and `tuner resume` repairs the
rest. Answers to signals belong to the process, so ours is found there, not in a global. Ray and
Tune put answers of their own in its place: `own_signals` and `tune_stops` undo that.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 25.0
"""From the first signal to the end at the latest: a preempted machine has 30 seconds."""
STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A person or a machine wants the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_code(number: int) -> int:
    """Of a process that a signal ended, as shells count: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def interruption(error: BaseException) -> int | None:
    """The signal because of which `error` was raised, if it was one."""
    if isinstance(error, Interrupted):
        return error.number
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    # Ray's processes may have had the same signal, and calls to them then fail in many ways.
    stop = _stop()
    return None if stop is None else stop.received


class Stop:
    """The answer to STOPPING signals.

    `received` is the first that came, if any; `go_on` is what to type to go on from here.
    """

    def __init__(self, *, grace: float = GRACE_SECONDS) -> None:
        self.received: int | None = None
        self.go_on = ""
        self.answer: Callable[[int], None] = _raise
        """What the first signal does, beside being noted."""
        self._grace = grace
        self._watchdog: threading.Timer | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._end_now("a second signal")
        self.note(number)
        self.answer(number)

    def note(self, number: int) -> None:
        """A first signal came: from now on there is only so much time."""
        self.received = number
        text = f"{self._grace:g} s after the first signal"
        self._watchdog = threading.Timer(self._grace, self._end_now, [text])
        self._watchdog.daemon = True
        self._watchdog.start()

    def over(self) -> None:
        """All is saved: nobody has to end the process any more."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _end_now(self, why: str) -> None:
        """Files are written whole or in lines, and databases in transactions, so that no moment
        is a bad one."""
        number = self.received or signal.SIGINT
        text = f"\nended at once ({why}): trials that ended are kept."
        if self.go_on:
            text += f" Go on with: {self.go_on}"
        os.write(2, f"{text}\n".encode())
        _kill_family()
        os._exit(exit_code(number))


def _kill_family() -> None:
    """End what this process started, and what that started: a Ray of our own, which would be slow
    to miss its driver. (On Linux; elsewhere it is left to do so.)"""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        parents[int(path.parent.name)] = int(fields[1])
    family = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    for pid in family - {os.getpid()}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _raise(number: int) -> None:
    raise Interrupted(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, and blocks in it, signals are answered by a `Stop`. A signal that is
    ignored (Ctrl-C in a shell's background job) stays so. Signals reach the main thread alone:
    in another one this does nothing."""
    if _stop() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = Stop()
    before = {n: signal.getsignal(n) for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        stop.over()
        for number, handler in before.items():
            signal.signal(number, handler)


def going_on_with(command: str) -> None:
    """From here on, a person who ends this process can go on with `command`."""
    stop = _stop()
    if stop is not None:
        stop.go_on = command


def check_stopped() -> None:
    """Raises Interrupted if a signal came that has raised nothing."""
    stop = _stop()
    if stop is not None and stop.received is not None:
        raise Interrupted(stop.received)


@contextmanager
def own_signals() -> Iterator[None]:
    """Answers to signals that the block sets (`ray.init` sets one for SIGTERM, which exits) are
    gone at its end. A SIGTERM meanwhile counts as one that came to us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGUSR1)}
    try:
        yield
    except SystemExit as error:
        stop = before[signal.SIGTERM]
        if error.code != signal.SIGTERM or not isinstance(stop, Stop):
            raise
        stop.note(signal.SIGTERM)
        raise Interrupted(signal.SIGTERM) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def tune_stops() -> Iterator[None]:
    """Around Tune's loop: the first signal ends it as SIGUSR1 does, after its step and with its
    workers told; ask `check_stopped` afterwards. Tune's own answer to SIGINT would not hear of a
    second one, and it has none to SIGTERM: TUNE_DISABLE_SIGINT_HANDLER keeps it away."""
    stop = _stop()
    with own_signals():
        if stop is not None:
            stop.answer = _tell_tune
        try:
            yield
        finally:
            if stop is not None:
                stop.answer = _raise


def _tell_tune(number: int) -> None:
    tune = signal.getsignal(signal.SIGUSR1)
    if not callable(tune):  # Its loop has not begun.
        _raise(number)
        return
    tune(number, None)


def _stop() -> Stop | None:
    """The one that answers now."""
    for number in STOPPING:
        handler = signal.getsignal(number)
        if isinstance(handler, Stop):
            return handler
    return None
