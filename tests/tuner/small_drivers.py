"""Drivers of a small study whose heart beats fast, on each kind of storage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tuner.drivers.lock import DriverLock, FileLock
from tuner.drivers.presence import Driver
from tuner.studies.study import Study

BEAT = 0.05
KINDS = ("journal", "sqlite", "postgresql")


def study_in(home: Path, name: str, url: str | None = None) -> Study:
    """A study as another home has it; the drivers need no more of its record than this."""
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    record = SimpleNamespace(name=name, storage=url, space={})
    return Study(folder, record)  # type: ignore[arg-type]


def driver_in(
    study: Study, *, joins: bool = False, lock: DriverLock | None = None, silent: float = 1.0
) -> Driver:
    return Driver(
        study.optuna(),
        study.folder,
        joins=joins,
        lock=lock or FileLock(study.folder / "lock"),
        beats=study.record.storage is not None,
        beat_seconds=BEAT,
        silent_seconds=silent,
    )
