"""How long a study has kept devices busy, over all of its sessions and drivers, and its limit.

A device is a GPU, or a machine's cores where there are none. What counts is the time for which
measuring costs, feature extraction, trials and finalists hold devices, whether they use them well
or not: that is what a bill counts. Each session keeps its own sums in the attributes of the Optuna
study, so that a resumed study and a second driver see all; a kill loses at most SAVE_SECONDS.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core.errors import InputError

from ..trials.cluster import Workers

if TYPE_CHECKING:
    import optuna

    from ..finalists.repeats import Payload, Runner, Work
    from ..home import Home
    from ..studies.study import Study

PREFIX = "device_seconds:"
"""Optuna study attribute of a session: this and a random name."""
COSTS, FEATURES, TRIALS, FINALISTS = "costs", "features", "trials", "finalists"
WALL = "wall"
"""Beside the device seconds of a session: the seconds from its start to its end."""
BUSY = (COSTS, FEATURES, TRIALS, FINALISTS)
SAVE_SECONDS = 30.0
LOOK_SECONDS = 5.0
"""How often the sums of other sessions are read, as they may be running now."""

Seconds = dict[str, float]


class DeviceMeter:
    """Adds up what one session of a study uses.

    Args:
        study: Optuna's.
        devices: that one trial, or one extraction worker, holds.
        before: device seconds that the study's first part has used, of a two-part one.
        limit: device seconds, with those before, after which no trial is started; None for none.
        clock: seconds; another one in tests.
    """

    def __init__(
        self,
        study: optuna.Study,
        *,
        devices: float,
        before: float = 0.0,
        limit: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.devices = devices
        self.limit = limit
        self.cohorts: list[tuple[tuple[int, ...], float]] = []
        """Of each cohort that ended: its trials, and the seconds (not device seconds) it took."""
        self._study = study
        self._before = before
        self._clock = clock
        self._key = PREFIX + secrets.token_hex(4)
        self._done: Seconds = {}
        self._running: dict[tuple[str, str], tuple[float, float]] = {}
        self._others = 0.0
        self._looked: float | None = None
        self._saved = clock()

    def begin(self, name: str, kind: str = TRIALS, *, devices: float | None = None) -> None:
        """Something starts to hold devices; `devices` None for those of one trial."""
        held = self.devices if devices is None else devices
        self._running[kind, name] = (self._clock(), held)

    def end(self, name: str, kind: str = TRIALS, *, numbers: Sequence[int] = ()) -> None:
        """It has let go of them; `numbers`: the trials of a cohort."""
        started, devices = self._running.pop((kind, name))
        seconds = self._clock() - started
        if numbers:
            self.cohorts.append((tuple(numbers), seconds))
        self.add(kind, seconds * devices)

    @contextmanager
    def busy(self, kind: str, *, devices: float) -> Iterator[None]:
        """Devices are held while the block runs, and to its end if it fails."""
        self.begin("", kind, devices=devices)
        try:
            yield
        finally:
            self.end("", kind)

    def add(self, kind: str, seconds: float) -> None:
        """Device seconds that were used; `WALL`: seconds of a session."""
        self._done[kind] = self._done.get(kind, 0.0) + seconds
        self.save()

    def save(self, *, at_most_every: float = 0.0) -> None:
        """Put what this session has used so far where others and later sessions find it."""
        if self._clock() - self._saved < at_most_every:
            return
        self._saved = self._clock()
        sums = {kind: round(seconds, 3) for kind, seconds in self.sums().items()}
        self._study.set_user_attr(self._key, sums)

    def sums(self) -> Seconds:
        """What this session has used so far, by kind."""
        sums = dict(self._done)
        for (kind, _), (started, devices) in self._running.items():
            sums[kind] = sums.get(kind, 0.0) + (self._clock() - started) * devices
        return sums

    @property
    def used(self) -> float:
        """Device seconds of all sessions and of the part before, those that run included."""
        if self._looked is None or self._clock() - self._looked >= LOOK_SECONDS:
            attributes = {k: v for k, v in self._study.user_attrs.items() if k != self._key}
            self._others = busy_seconds(_sums(attributes))
            self._looked = self._clock()
        return self._before + self._others + busy_seconds(self.sums())

    @property
    def spent(self) -> bool:
        """Whether no further trial may start."""
        return self.limit is not None and self.used >= self.limit

    def too_little(self) -> InputError:
        """What to say where it is spent before there is a trial."""
        return InputError(
            f"features alone took {hours_text(self.used)} device-hours, so no trial could start",
            where=f"--device-hours {hours_text(self.limit or 0.0)}",
            hint="allow more; the features stay in the cache",
        )

    def text(self) -> str:
        """For the live view; empty where there is no limit."""
        if self.limit is None:
            return ""
        return f"{hours_text(self.used)} of {hours_text(self.limit)} device-hours"


def open_meter(
    study: Study, home: Home, workers: Workers, limit: float | None = None
) -> DeviceMeter:
    """The meter of a session of `study`. `limit`: in device seconds, for all of its parts."""
    from ..studies.study import open_study

    before = 0.0
    if study.record.after is not None:
        before = busy_seconds(used_by(open_study(home, study.record.after)))
    return DeviceMeter(
        study.optuna(), devices=devices_of_trial(workers), before=before, limit=limit
    )


def devices_of_trial(workers: Workers) -> float:
    """Devices that one trial holds: whole GPUs or a part of one, or a share of a machine's cores
    times its workers."""
    return (workers.gpus or workers.memory_share) * workers.per_trial


def used_by(study: Study) -> Seconds:
    """What all sessions of a study have used, by kind."""
    return _sums(study.optuna().user_attrs)


def busy_seconds(sums: Mapping[str, float]) -> float:
    """Device seconds of all kinds together."""
    return sum(sums.get(kind, 0.0) for kind in BUSY)


def metered(run: Runner, meter: DeviceMeter, workers: Workers) -> Runner:
    """`run`, with the devices counted that its jobs hold: as many as there are jobs, or all of
    them until the last job ends."""

    def counted(work: Work, payloads: Sequence[Payload], totals: Mapping[str, int]) -> list[Any]:
        at_once = max(1, min(len(payloads), workers.count))
        with meter.busy(FINALISTS, devices=at_once * meter.devices):
            return run(work, payloads, totals)

    return counted


def hours_text(seconds: float) -> str:
    """Hours with two digits that say something: `0.034`, `1.2`, `120`."""
    hours = seconds / 3600
    return f"{hours:.0f}" if hours >= 100 else f"{hours:.2g}"


def _sums(attributes: Mapping[str, Any]) -> Seconds:
    sums: Seconds = {}
    for key, kinds in attributes.items():
        if key.startswith(PREFIX):
            for kind, seconds in kinds.items():
                sums[kind] = sums.get(kind, 0.0) + float(seconds)
    return sums
