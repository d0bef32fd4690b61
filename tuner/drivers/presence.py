"""Several processes that run trials of one study: who they are, and who of them lives.

A driver tells of itself in the study's attributes in Optuna: an entry with a beat that changes
every few seconds. Nobody compares clocks: a driver whose beat others have seen stand still for
SILENT_SECONDS is dead. Drivers of one home know at once, by a locked file that the system frees.
The first driver (search, resume) is one at a time and ends the study; joiners only run trials.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError

from .lock import DriverLock, Kept, driver_lock, locked

if TYPE_CHECKING:
    import optuna

    from ..studies.study import Study

BEAT_SECONDS = 3.0
SILENT_SECONDS = 30.0
"""A beat that stands still for so long is that of a dead driver."""
PREFIX = "driver:"
"""Optuna study attribute of a driver: this and its id."""
OWNER = "driver"
"""Optuna trial attribute: id of the driver that runs the trial."""
FOLDER = ".drivers"
"""In a study's folder: a file for each driver of this home, which it keeps locked."""
SESSION_FILE = ".session"
"""In a study's folder: locked by the first driver of this home."""
SECOND_HINT = "help it: tuner join; or wait for its end, or stop it (Ctrl-C keeps its trials)"


@dataclass(kw_only=True)
class _Watched:
    """What was seen of another driver's beat."""

    beat: int
    silent: float = 0.0
    """Seconds that it was seen to stand still."""
    looked: float
    """`time.monotonic()` of the last look."""
    moved: bool
    """Whether it was seen to change."""


class Driver:
    """This process among the drivers of a study. `driving` makes one.

    Args:
        study: Optuna's; of a two-part study, that of the first part.
        folder: of the study, in this home.
        joins: whether it only runs trials.
        lock: between all drivers of the study.
        beats: whether drivers of other homes can be there.
        beat_seconds: how often it tells that it lives; None for BEAT_SECONDS.
        silent_seconds: how long another may say nothing; None for SILENT_SECONDS.
    """

    def __init__(
        self,
        study: optuna.Study,
        folder: Path,
        *,
        joins: bool,
        lock: DriverLock,
        beats: bool,
        beat_seconds: float | None = None,
        silent_seconds: float | None = None,
    ) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.joins = joins
        self.beat_seconds = beat_seconds or BEAT_SECONDS
        self._silent_seconds = silent_seconds or SILENT_SECONDS
        self._study = study
        self._folder = folder / FOLDER
        self._lock = lock
        self._beats = beats
        self._beat = 0
        self._watched: dict[str, _Watched] = {}
        self._watching = threading.Lock()
        self._stop = threading.Event()
        self._error: Exception | None = None

    # ---- itself ---------------------------------------------------------------------------

    @contextmanager
    def registered(self) -> Iterator[None]:
        """The others know of this driver while the block runs.

        After an error nothing is told, as the storage may be what failed: here the free lock says
        it, elsewhere the silence.
        """
        self._folder.mkdir(exist_ok=True)
        path = self._folder / self.id
        thread = threading.Thread(target=self._keep_telling, name="driver-beat", daemon=True)
        with path.open("w") as file:
            assert locked(file), path  # Before anyone hears of it.
            self._tell(ended=False)
            if self._beats:
                thread.start()
            try:
                yield
            except KeyboardInterrupt:
                self._end(thread, path)
                raise
            finally:
                self._stop.set()
            self._end(thread, path)

    def hold(self) -> AbstractContextManager[Kept]:
        """The lock between the study's drivers; not reentrant."""
        return self._lock.hold()

    def check(self) -> None:
        """Raises what the thread met that tells of this driver: the storage is out of reach."""
        if self._error is not None:
            raise self._error

    def _end(self, thread: threading.Thread, path: Path) -> None:
        self._stop.set()
        if self._beats:
            thread.join()
        self.check()
        self._tell(ended=True)
        path.unlink(missing_ok=True)

    def _tell(self, *, ended: bool) -> None:
        self._beat += 1
        entry = {"beat": self._beat, "joins": self.joins, "ended": ended}
        self._study.set_user_attr(PREFIX + self.id, entry)

    def _keep_telling(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            try:
                self._tell(ended=False)
                self.others()  # So that silence is noticed while trials run.
            except Exception as error:  # Kept for `check`: a thread has nobody to raise to.
                self._error = error
                return

    # ---- the others -----------------------------------------------------------------------

    def others(self) -> dict[str, bool]:
        """The other drivers that live, by id; whether each only joins."""
        entries = {
            name.removeprefix(PREFIX): entry
            for name, entry in self._study.user_attrs.items()
            if name.startswith(PREFIX) and name != PREFIX + self.id
        }
        with self._watching:
            return {i: entry["joins"] for i, entry in entries.items() if self._lives(i, entry)}

    @property
    def led(self) -> bool:
        """Whether a first driver lives among the others."""
        return not all(self.others().values())

    def refuse_second(self) -> None:
        """Raises InputError if another first driver lives. One of another home that did not say
        that it ended is watched until its beat changes, or long enough."""
        while firsts := [other for other, joins in self.others().items() if not joins]:
            for other in firsts:
                if other not in self._watched or self._watched[other].moved:
                    raise InputError(
                        f"another process runs this study now ({other})",
                        where=f"study {self._study.study_name}",
                        hint=SECOND_HINT,
                    )
            time.sleep(self.beat_seconds / 2)

    def _lives(self, other: str, entry: Mapping[str, Any]) -> bool:
        if entry["ended"]:
            return False
        here = self._lives_here(other)
        if here is None:
            return self._beats_on(other, entry["beat"])
        if not here:
            self._study.set_user_attr(PREFIX + other, {**entry, "ended": True})
            (self._folder / other).unlink(missing_ok=True)
        return here

    def _lives_here(self, other: str) -> bool | None:
        """Whether a driver of this home lives; None for one of another home."""
        try:
            with (self._folder / other).open() as file:
                return not locked(file, shared=True)
        except FileNotFoundError:
            return None

    def _beats_on(self, other: str, beat: int) -> bool:
        """Whether a driver's beat has changed lately, as far as we looked."""
        now = time.monotonic()
        watched = self._watched.get(other)
        if watched is None or watched.beat != beat:
            self._watched[other] = _Watched(beat=beat, looked=now, moved=watched is not None)
            return True
        # Time in which nobody looked (asleep, or the storage was away) is no silence.
        watched.silent += min(now - watched.looked, 2 * self.beat_seconds)
        watched.looked = now
        return watched.silent < self._silent_seconds


@contextmanager
def driving(study: Study, *, joins: bool = False) -> Iterator[Driver]:
    """Be a driver of a study while the block runs.

    Raises InputError if another process runs it, unless this one only `joins`.
    """
    with contextlib.ExitStack() as stack:
        if not joins:
            stack.enter_context(_first_here(study))
        state = study.optuna()
        url = study.storage_url()
        lock = driver_lock(url, study.folder, study.record.name, wait=lambda: _ask_storage(state))
        driver = Driver(state, study.folder, joins=joins, lock=lock, beats=url is not None)
        stack.enter_context(driver.registered())
        if not joins:
            driver.refuse_second()
        yield driver


@contextmanager
def _first_here(study: Study) -> Iterator[None]:
    """One first driver of a study in this home at a time, found out before anything is asked."""
    with (study.folder / SESSION_FILE).open("a") as file:
        if not locked(file):
            raise InputError(
                "another process runs this study now",
                where=f"study {study.record.name}",
                hint=SECOND_HINT,
            )
        yield


def _ask_storage(study: optuna.Study) -> None:
    """Any question will do: the storage waits until its database answers."""
    _ = study.user_attrs
