"""Drivers of one study: real locks, real PostgreSQL, real processes that are killed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import tuner.drivers.presence
from core.errors import InputError
from tuner.drivers.lock import DriverLock, PostgresLock, check_shared, driver_lock
from tuner.drivers.presence import FOLDER, PREFIX, Driver, driving
from tuner.studies.storage import open_storage

from ..servers import Postgres
from .small_drivers import BEAT, KINDS, driver_in, study_in

pytestmark = pytest.mark.usefixtures("quiet_optuna")

HOLD = """
import sys, time
from pathlib import Path
from tuner.drivers.lock import driver_lock
url = sys.argv[1] or None
with driver_lock(url, Path(sys.argv[2]), sys.argv[3], wait=lambda: None).hold():
    print("held", flush=True)
    time.sleep(60)
"""


# ---- the lock -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_driver_holds_the_lock_at_a_time(
    kind: str, url_of: Callable[[str], str | None], tmp_path: Path, name: str
) -> None:
    locks = [driver_lock(url_of(kind), tmp_path, name, wait=lambda: None) for _ in range(4)]
    inside, most, turns = 0, 0, []

    def work(lock: DriverLock, number: int) -> None:
        nonlocal inside, most
        for _ in range(5):
            with lock.hold() as kept:
                inside += 1
                most = max(most, inside)
                assert kept()
                turns.append(number)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work, args=(lock, n)) for n, lock in enumerate(locks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(turns) == sorted([*range(4)] * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lock_of_a_killed_process_is_free(
    kind: str, url_of: Callable[[str], str | None], tmp_path: Path, name: str
) -> None:
    url = url_of(kind)
    command = [sys.executable, "-c", HOLD, url or "", str(tmp_path), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        taken = threading.Event()

        def take() -> None:
            with driver_lock(url, tmp_path, name, wait=lambda: None).hold():
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.5)
        holder.kill()
        assert taken.wait(60)
        thread.join()


def test_locks_of_other_studies_do_not_wait(postgres: Postgres, tmp_path: Path) -> None:
    def lock(name: str) -> DriverLock:
        return PostgresLock(postgres.url, name, wait=lambda: None)

    with lock("one").hold(), lock("two").hold():
        pass


def test_a_lock_is_lost_with_its_server_and_had_again(postgres: Postgres, name: str) -> None:
    waits = []

    def wait() -> None:
        waits.append(postgres.running)
        if not postgres.running:
            postgres.start()

    lock = PostgresLock(postgres.url, name, wait=wait)
    with lock.hold() as kept:
        assert kept()
        postgres.stop()
        assert not kept()
    with lock.hold() as kept:
        assert kept()
    assert waits and not waits[0]


def test_a_frozen_holder_loses_the_lock(
    postgres: Postgres, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.drivers.lock.IDLE_SECONDS", 1)
    first, second = (PostgresLock(postgres.url, name, wait=lambda: None) for _ in range(2))
    started = time.monotonic()
    with first.hold() as kept, second.hold() as taken:
        assert time.monotonic() - started > 0.9
        assert taken()
        assert not kept()


def test_other_databases_are_refused_for_several_homes() -> None:
    check_shared("postgresql+psycopg2://me@host/db")
    check_shared("sqlite:///some.db")
    with pytest.raises(InputError, match=r"--storage mysql://me:\*\*\*@host/db: several drivers"):
        check_shared("mysql://me:secret@host/db")


# ---- who lives ----------------------------------------------------------------------------


@contextmanager
def registered(driver: Driver) -> Iterator[Driver]:
    with driver.registered():
        yield driver


@pytest.mark.parametrize("kind", KINDS)
def test_drivers_know_each_other_until_they_end(
    kind: str, url_of: Callable[[str], str | None], tmp_path: Path, name: str
) -> None:
    study = study_in(tmp_path, name, url_of(kind))
    with registered(driver_in(study)) as first:
        assert first.others() == {} and not first.led
        with registered(driver_in(study, joins=True)) as joiner:
            assert first.others() == {joiner.id: True} and not first.led
            assert joiner.others() == {first.id: False} and joiner.led
        assert first.others() == {}
    assert not list((study.folder / FOLDER).iterdir())


def test_drivers_of_two_homes_live_as_long_as_they_beat(
    url_of: Callable[[str], str | None], tmp_path: Path, name: str
) -> None:
    url = url_of("postgresql")
    here, there = (study_in(tmp_path / home, name, url) for home in ("here", "there"))
    with (
        registered(driver_in(here, silent=30 * BEAT)) as watching,
        registered(driver_in(there, joins=True)) as other,
    ):
        # For longer than the silence that ends a driver.
        deadline = time.monotonic() + 45 * BEAT
        while time.monotonic() < deadline:
            assert watching.others() == {other.id: True}
            time.sleep(BEAT / 3)
        other._stop.set()  # It freezes: nothing is told, nothing is ended.
        give_up = time.monotonic() + 60
        while watching.others():
            assert time.monotonic() < give_up
            time.sleep(BEAT / 3)
        other._tell(ended=False)  # And wakes up.
        assert watching.others() == {other.id: True}


def test_time_without_a_look_is_no_silence(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(tuner.drivers.presence, "time", SimpleNamespace(monotonic=lambda: now))
    study = study_in(tmp_path, name)
    driver = driver_in(study, silent=20 * BEAT)
    study.optuna().set_user_attr(PREFIX + "far", {"beat": 1, "joins": True, "ended": False})
    assert driver.others() == {"far": True}
    now = 1000.0  # The machine slept.
    assert driver.others() == {"far": True}
    for _ in range(17):
        now += BEAT
        assert driver.others() == {"far": True}
    now += 2 * BEAT
    assert driver.others() == {}


def test_a_killed_driver_of_this_home_is_dead_at_once(tmp_path: Path, name: str) -> None:
    study = study_in(tmp_path, name)
    driver = driver_in(study)
    other = "host-1-abc"
    study.optuna().set_user_attr(PREFIX + other, {"beat": 1, "joins": False, "ended": False})
    (study.folder / FOLDER).mkdir()
    code = """
import fcntl, sys, time
file = open(sys.argv[1], "w"); fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True); time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(study.folder / FOLDER / other)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert driver.others() == {other: False}
        process.kill()
        process.wait()
        assert driver.others() == {}
    assert study.optuna().user_attrs[PREFIX + other]["ended"]


def test_a_second_first_driver_is_refused(
    url_of: Callable[[str], str | None], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.drivers.presence, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(tuner.drivers.presence, "SILENT_SECONDS", 5.0)
    url = url_of("postgresql")
    here, there = (study_in(tmp_path / home, name, url) for home in ("here", "there"))
    with driving(here):
        for study in (here, there):
            with (
                pytest.raises(InputError, match="another process runs this study now"),
                driving(study),
            ):
                pass
        with driving(there, joins=True) as joiner:
            assert joiner.led
    with driving(there):
        pass


def test_a_dead_first_driver_of_another_home_is_waited_out(
    url_of: Callable[[str], str | None], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.drivers.presence, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(tuner.drivers.presence, "SILENT_SECONDS", 0.5)
    study = study_in(tmp_path, name, url_of("postgresql"))
    study.optuna().set_user_attr(PREFIX + "far", {"beat": 7, "joins": False, "ended": False})
    started = time.monotonic()
    with driving(study):
        assert time.monotonic() - started > 0.4


def test_what_the_beat_met_is_raised(postgres: Postgres, tmp_path: Path, name: str) -> None:
    study = study_in(tmp_path, name, postgres.url)
    study._storage = open_storage(postgres.url, study.folder, limit=0.2)
    with pytest.raises(InputError, match="storage"), registered(driver_in(study)) as driver:
        postgres.stop()
        give_up = time.monotonic() + 60
        try:
            while driver._error is None and time.monotonic() < give_up:
                time.sleep(0.05)
        finally:
            postgres.start()
        driver.check()
