"""Optuna's storage through outages of a real PostgreSQL: nothing lost, nothing twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy import create_engine, text

from core.errors import InputError
from tuner.studies.outage import Outage
from tuner.studies.storage import engine_options, open_storage, stored_studies, watch_outages
from tuner.studies.surviving_storage import SurvivingStorage

from ..servers import Postgres
from .cutting_proxy import CuttingProxy, Moment


class Heard:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reasons: list[str] = []

    def storage_away(self, seconds: float, reason: str) -> None:
        self.reasons.append(reason)
        if not seconds:
            self.lines.append("away")

    def storage_back(self, seconds: float) -> None:
        self.lines.append("back")


@pytest.fixture(scope="module")
def proxy(postgres: Postgres) -> Iterator[CuttingProxy]:
    with CuttingProxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def storage(postgres: Postgres, tmp_path: Path) -> SurvivingStorage:
    return _opened(postgres.url, tmp_path)


def _opened(url: str, folder: Path, *, limit: float = 60) -> SurvivingStorage:
    storage = open_storage(url, folder, limit=limit)
    assert isinstance(storage, SurvivingStorage)
    return storage


def _through(proxy: CuttingProxy, postgres: Postgres) -> SurvivingStorage:
    """The storage behind the proxy; it tries again at once."""
    proxy.cut_nothing()
    url = postgres.url.replace(f":{postgres.port}/", f":{proxy.port}/")
    outage = Outage(where="--storage", hint="", limit=60, sleep=lambda _: time.sleep(0.01))
    storage = SurvivingStorage(RDBStorage(url, engine_kwargs=engine_options(url)), outage)
    watch_outages(storage, Heard())
    return storage


def _small_study(storage: SurvivingStorage, name: str) -> None:
    """Every kind of write, as a search makes them."""
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    study.set_user_attr("record", {"trials": 2})
    study.enqueue_trial({"x": 0.25})
    for number in range(2):
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        trial.set_user_attr("outcome", {"number": number})
        trial.report(0.5, 1)
        study._storage.set_trial_system_attr(trial._trial_id, "rung", number)
        if number:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, x)


def _check_small_study(reader: RDBStorage, name: str) -> None:
    """Read by Optuna alone."""
    study = optuna.load_study(study_name=name, storage=reader)
    first, second = study.trials
    assert (first.number, second.number) == (0, 1)
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert (first.params, first.value) == ({"x": 0.25}, 0.25)
    assert list(second.params) == ["x"] and second.value == 0.5
    for trial in (first, second):
        assert trial.user_attrs == {"outcome": {"number": trial.number}}
        assert trial.intermediate_values == {1: 0.5}
        assert trial.system_attrs["rung"] == trial.number
    assert study.user_attrs == {"record": {"trials": 2}}


# ---- each write, cut at its commit ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_each_commit_cut_off_is_done_once(
    postgres: Postgres, proxy: CuttingProxy, moment: Moment
) -> None:
    storage, reader = _through(proxy, postgres), RDBStorage(postgres.url)
    commit = 0
    while True:
        commit += 1
        proxy.cut_at(commit, moment)
        _small_study(storage, f"{moment}-{commit}")
        if not proxy.num_cuts:
            break
        _check_small_study(reader, f"{moment}-{commit}")
    assert commit > 20, "not all of the small study was cut"
    names = [study.study_name for study in reader.get_all_studies()]
    assert sorted(n for n in names if n.startswith(moment)) == sorted(
        f"{moment}-{number}" for number in range(1, commit + 1)
    )


def test_a_commit_that_the_server_does_late_is_done_once(
    postgres: Postgres, proxy: CuttingProxy
) -> None:
    """The server is still at the first try when the second comes: it must wait for it."""
    storage = _through(proxy, postgres)
    study = optuna.create_study(storage=storage, study_name="late")
    proxy.cut_at(2, "late")  # The first looks for waiting trials.
    trial = study.ask()
    assert proxy.num_cuts == 1
    assert [t.number for t in study.trials] == [0] and trial.number == 0
    study.enqueue_trial({"x": 0.5})
    proxy.cut_at(2, "late")
    assert study.ask().number == 1
    assert proxy.num_cuts == 1
    proxy.cut_at(2, "late")
    study.tell(trial, 1.0)
    assert proxy.num_cuts == 1
    read = optuna.load_study(study_name="late", storage=postgres.url).trials
    assert [t.state for t in read] == [TrialState.COMPLETE, TrialState.RUNNING]


def test_a_waiting_trial_that_another_driver_took_meanwhile_is_its_own(
    postgres: Postgres, proxy: CuttingProxy, storage: SurvivingStorage
) -> None:
    ours = optuna.create_study(storage=_through(proxy, postgres), study_name="taken")
    ours.enqueue_trial({"x": 0.5})
    theirs = optuna.load_study(study_name="taken", storage=storage)
    taken: list[int] = []
    proxy.cut_at(2, "before", then=lambda: taken.append(theirs.ask().number))
    assert ours.ask().number == 1
    assert proxy.num_cuts == 1 and taken == [0]
    states = [t.state for t in ours.trials]
    assert states == [TrialState.RUNNING, TrialState.RUNNING]


def test_what_another_driver_told_otherwise_is_not_ours(
    postgres: Postgres, proxy: CuttingProxy, storage: SurvivingStorage
) -> None:
    ours = optuna.create_study(storage=_through(proxy, postgres), study_name="told")
    trial = ours.ask()
    theirs = optuna.load_study(study_name="told", storage=storage)
    proxy.cut_at(2, "before", then=lambda: theirs.tell(trial.number, 2.0) and None)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        ours.tell(trial, 1.0)
    assert proxy.num_cuts == 1
    assert [t.value for t in ours.trials] == [2.0]


def test_a_study_that_another_made_meanwhile_is_not_ours(
    postgres: Postgres, proxy: CuttingProxy, storage: SurvivingStorage
) -> None:
    def make() -> None:
        optuna.create_study(storage=storage, study_name="made").set_user_attr("by", "them")

    through = _through(proxy, postgres)
    proxy.cut_at(1, "before", then=make)
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        through.create_new_study([StudyDirection.MAXIMIZE], "made")
    assert proxy.num_cuts == 1


def test_finished_trials_are_added_once(postgres: Postgres, proxy: CuttingProxy) -> None:
    study = optuna.create_study(storage=_through(proxy, postgres), study_name="added")
    added = create_trial(params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}, value=3)
    proxy.cut_at(1, "after")
    study.add_trial(added)
    assert proxy.num_cuts == 1
    (read,) = optuna.load_study(study_name="added", storage=postgres.url).trials
    assert (read.value, read.params, read.state) == (3, {"x": 0.5}, TrialState.COMPLETE)
    study._storage.delete_study(study._study_id)
    assert "added" not in stored_studies(postgres.url)


# ---- the server away for a while --------------------------------------------------------------


def test_calls_wait_until_the_server_is_back(
    postgres: Postgres, storage: SurvivingStorage, name: str
) -> None:
    heard = Heard()
    watch_outages(storage, heard)
    study = optuna.create_study(storage=storage, study_name=name)
    trial = study.ask()
    postgres.stop()
    back = threading.Timer(2, postgres.start)
    stopped = time.monotonic()
    back.start()
    study.tell(trial, 1.0)
    assert time.monotonic() - stopped > 2
    assert [t.value for t in study.trials] == [1.0]
    assert heard.lines == ["away", "back"]
    assert all("refused" in reason or "starting up" in reason for reason in heard.reasons)
    back.join()


@pytest.mark.slow
def test_many_threads_ask_through_a_restart(
    postgres: Postgres, storage: SurvivingStorage, name: str
) -> None:
    heard = Heard()
    watch_outages(storage, heard)
    study = optuna.create_study(storage=storage, study_name=name)

    def one(_: int) -> int:
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
        return trial.number

    with ThreadPoolExecutor(4) as pool:
        numbers = pool.map(one, range(60))
        for _ in range(2):
            time.sleep(0.3)
            postgres.stop()
            time.sleep(0.3)
            postgres.start()
        assert sorted(numbers) == list(range(60))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    assert len(study.trials) == 60
    # A server dies process by process: one may still answer when another is gone.
    pairs = len(heard.lines) // 2
    assert heard.lines == ["away", "back"] * pairs and 1 <= pairs <= 4


def test_after_the_limit_it_says_how_to_go_on_and_waits_no_more(
    postgres: Postgres, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "mine"
    storage = _opened(postgres.url, folder, limit=3)
    study = optuna.create_study(storage=storage, study_name=name)
    trial = study.ask()
    postgres.stop()
    try:
        with pytest.raises(InputError, match=r"away, for 3 s now.*\n.*tuner resume mine") as raised:
            study.tell(trial, 1.0)
        assert "bench@127.0.0.1" in str(raised.value)
        started = time.monotonic()
        with pytest.raises(InputError, match="away"):
            _ = study.trials
        assert time.monotonic() - started < 3
    finally:
        postgres.start()
    study.tell(trial, 1.0)
    assert [t.value for t in study.trials] == [1.0]


def test_one_that_is_not_there_at_the_start_is_said_at_once(
    postgres: Postgres, tmp_path: Path
) -> None:
    postgres.stop()
    try:
        started = time.monotonic()  # An outage would be waited for, for a minute and more.
        with pytest.raises(InputError, match=r"storage cannot be opened.*refused"):
            open_storage(postgres.url, tmp_path)
        assert time.monotonic() - started < 30
    finally:
        postgres.start()


def test_waiting_for_the_storage_itself(postgres: Postgres, storage: SurvivingStorage) -> None:
    storage.wait()
    postgres.stop()
    back = threading.Timer(0.5, postgres.start)
    stopped = time.monotonic()
    back.start()
    storage.wait()
    assert time.monotonic() - stopped > 0.5, "it was not waited for"
    back.join()
    assert storage.get_all_studies()


def test_an_error_of_the_caller_is_no_outage(
    storage: SurvivingStorage, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = optuna.create_study(storage=storage, study_name=name)
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(storage=storage, study_name=name)
    with pytest.raises(KeyError):
        storage.get_trial(10**6)
    with pytest.raises(KeyError):
        storage.set_trial_state_values(10**6, TrialState.RUNNING)
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    with pytest.raises(KeyError):
        storage.delete_study(10**6)
    assert not capsys.readouterr().err


# ---- sqlite -------------------------------------------------------------------------------------


def test_a_locked_sqlite_file_is_waited_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage = _opened(f"{url}?timeout=0.1", tmp_path)
    heard = Heard()
    watch_outages(storage, heard)
    study = optuna.create_study(storage=storage, study_name="locked")
    with create_engine(url).connect() as other:
        other.execute(text("BEGIN EXCLUSIVE"))
        release = threading.Timer(0.8, other.rollback)
        release.start()
        trial = study.ask()
        release.join()
    study.tell(trial, 1.0)
    assert [t.value for t in study.trials] == [1.0]
    assert heard.lines == ["away", "back"] and "locked" in heard.reasons[0]


def test_options_of_the_url_go_first() -> None:
    given: dict[str, Any] = engine_options("postgresql+psycopg2://u@h/d?connect_timeout=1")
    assert given["pool_pre_ping"] is True
    assert "connect_timeout" not in given["connect_args"]
    assert given["connect_args"]["keepalives_idle"] == 10
    assert engine_options("sqlite:////x/y.db") == {}


def test_how_long_it_waits_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db?timeout=0.01"
    monkeypatch.setenv("TUNER_STORAGE_MINUTES", "0.01")
    storage = open_storage(url, tmp_path)
    study = optuna.create_study(storage=storage, study_name="short")
    with create_engine(url).connect() as other:
        other.execute(text("BEGIN EXCLUSIVE"))
        with pytest.raises(InputError, match=r"away, for 1 s now \(.*locked"):
            study.ask()
        other.rollback()
    assert study.ask().number == 0
    for wrong in ("soon", "-1", "inf"):
        monkeypatch.setenv("TUNER_STORAGE_MINUTES", wrong)
        with pytest.raises(InputError, match="expected minutes"):
            open_storage(url, tmp_path)
