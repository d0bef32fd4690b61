"""Trials shared out among drivers: the budget is kept to the trial, the dead are taken over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, Trial, TrialState

from core.report import Outcome, Status
from tuner.drivers.presence import OWNER, Driver
from tuner.drivers.turns import SharedBudget, Turns, publish_budget, published_budget, remembered
from tuner.studies.study import Study
from tuner.trials.telling import tell

from .small_drivers import BEAT, KINDS, driver_in, study_in

pytestmark = pytest.mark.usefixtures("quiet_optuna")

SLOW = pytest.mark.slow
WORK = """
import json, sys, time
from pathlib import Path
from tests.tuner.small_drivers import driver_in, study_in
from tuner.drivers.lock import driver_lock
from tuner.drivers.turns import Turns
home, name, url, budget, sleep = sys.argv[1:]
study = study_in(Path(home), name, url or None)
lock = driver_lock(url or None, study.folder, name, wait=lambda: None)
driver = driver_in(study, joins=True, lock=lock, silent=60)
taken = []
with driver.registered():
    turns = Turns(study.optuna(), driver, trials=int(budget))
    while turns.left:
        suggest = lambda trial: trial.suggest_float("x", 0, 1)
        for trial in turns.take(4, new=4, suggest=suggest):
            taken.append(trial.number)
            print(json.dumps(taken), flush=True)
            with turns.ending([trial]) as ours:
                assert ours == [True]
                if not float(sleep):
                    turns._study.tell(trial, 0.5)
        time.sleep(float(sleep))
"""


@pytest.fixture
def study(tmp_path: Path, name: str) -> Study:
    return study_in(tmp_path, name)


@pytest.fixture
def driver(study: Study) -> Iterator[Driver]:
    driver = driver_in(study)
    with driver.registered():
        yield driver


def worker(home: Path, name: str, url: str | None, *, budget: int, sleep: float = 0) -> Any:
    """A process that takes trials by fours and ends them at once, or sleeps over them."""
    command = [sys.executable, "-c", WORK, str(home), name, url or "", str(budget), str(sleep)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def take(turns: Turns, size: int) -> list[Trial]:
    return turns.take(size, new=size, suggest=lambda trial: trial.suggest_float("x", 0, 1))


def running(study: Study) -> list[FrozenTrial]:
    return study.optuna().get_trials(deepcopy=False, states=(TrialState.RUNNING,))


@pytest.mark.parametrize(
    "kind", [kind if kind == "journal" else pytest.param(kind, marks=SLOW) for kind in KINDS]
)
def test_processes_share_a_budget_to_the_trial(
    kind: str, url_of: Callable[[str], str | None], tmp_path: Path, name: str
) -> None:
    """The journal's processes share a home, the databases' have one each."""
    url = url_of(kind)
    study = study_in(tmp_path / "0", name, url)
    study.optuna().enqueue_trial({"x": 0.25})
    homes = [tmp_path / (str(n) if url else "0") for n in range(3)]
    workers = [worker(home, name, url, budget=26) for home in homes]
    outputs = [process.communicate(timeout=200)[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0, 0]
    taken = [json.loads(output.splitlines()[-1]) for output in outputs if output]
    assert sorted(n for numbers in taken for n in numbers) == list(range(26))
    trials = study.optuna().get_trials(deepcopy=False)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 26
    assert trials[0].params == {"x": 0.25}
    owners = [{trials[n].user_attrs[OWNER] for n in numbers} for numbers in taken]
    assert all(len(ids) == 1 for ids in owners)
    assert len({next(iter(ids)) for ids in owners}) == len(taken)


@pytest.mark.parametrize("kind", ["journal", pytest.param("postgresql", marks=SLOW)])
def test_trials_of_a_killed_process_are_taken_over(
    kind: str, url_of: Callable[[str], str | None], tmp_path: Path, name: str
) -> None:
    """At once in the same home, after the silence from another."""
    url = url_of(kind)
    here, there = tmp_path / "here", tmp_path / ("there" if url else "here")
    study = study_in(here, name, url)
    with worker(there, name, url, budget=3, sleep=60) as process:
        assert process.stdout is not None
        for _ in range(3):
            numbers = json.loads(process.stdout.readline())
        assert numbers == [0, 1, 2]
        driver, heard = driver_in(study, silent=1.0), []
        with driver.registered():
            turns = Turns(study.optuna(), driver, trials=5, on_adopted=heard.extend)
            turns.look(now=True)
            assert turns.left == 2 and not turns.unfinished, "a living driver's were taken"
            assert turns.others_run()
            process.kill()
            process.wait()
            give_up = time.monotonic() + 100
            while not turns.unfinished:
                assert time.monotonic() < give_up
                turns.look(now=True)
                time.sleep(BEAT)
            assert heard == [0, 1, 2]
            assert [trial.number for trial in take(turns, 8)] == [0, 1, 2, 3, 4]
            assert {t.user_attrs[OWNER] for t in running(study)} == {driver.id}
            assert not turns.others_run()


def test_only_one_of_several_takes_over(study: Study) -> None:
    orphan = study.optuna().ask()
    drivers = [driver_in(study, joins=True) for _ in range(4)]
    turns = [Turns(study.optuna(), driver, trials=1) for driver in drivers]
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        for driver in drivers:
            stack.enter_context(driver.registered())
        list(pool.map(lambda one: one.look(now=True), turns))
    assert [len(one.unfinished) for one in turns].count(1) == 1
    assert running(study)[0].number == orphan.number


def test_the_last_trials_are_shared(study: Study, driver: Driver) -> None:
    joiner = driver_in(study, joins=True)
    with joiner.registered():
        first, second = (Turns(study.optuna(), d, trials=10) for d in (driver, joiner))
        assert [t.number for t in take(first, 32)] == [0, 1, 2, 3, 4]
        assert [t.number for t in take(second, 32)] == [5, 6, 7]
        assert [t.number for t in take(first, 32)] == [8]
        assert [t.number for t in take(second, 32)] == [9]
        assert not take(first, 32) and not take(second, 32)


def test_a_lost_lock_ends_the_round_early(study: Study) -> None:
    class Failing:
        answers = [True, True, False]

        def hold(self) -> Any:
            return nullcontext(lambda: self.answers.pop(0) if self.answers else True)

    driver = driver_in(study, lock=Failing())
    turns = Turns(study.optuna(), driver, trials=4)
    assert [t.number for t in take(turns, 4)] == [0, 1]
    assert [t.number for t in take(turns, 4)] == [2, 3]


def test_an_end_that_comes_too_late_does_not_count(study: Study, driver: Driver) -> None:
    """A driver that froze, and woke up after its trial was taken over."""
    frozen = driver_in(study, joins=True)  # It never registered: the others cannot see it.
    sleeper, waking = (Turns(study.optuna(), d, trials=1) for d in (frozen, driver))
    (asleep,) = take(sleeper, 1)
    assert sleeper.report(asleep, 1, 0.1)
    waking.look(now=True)
    assert waking.reported == {0: {1}}
    (awake,) = take(waking, 1)
    assert awake.number == asleep.number
    with sleeper.ending([asleep]) as ours:
        assert ours == [False]
    with waking.ending([awake]) as ours:
        assert ours == [True]
        study.optuna().tell(awake, 0.7)
    with waking.ending([awake]) as ours:
        assert ours == [False]
    assert not sleeper.report(asleep, 3, 0.2)


def test_a_joiner_follows_the_budget_of_the_first(study: Study, driver: Driver) -> None:
    state = study.optuna()
    joiner = driver_in(study, joins=True)
    first, follower = Turns(state, driver, trials=3), Turns(state, joiner, trials=None)
    assert published_budget(state) is None
    assert follower.left == 0 and not take(follower, 5)
    publish_budget(state, SharedBudget(trials=3))
    assert [t.number for t in take(follower, 2)] == [0, 1]
    publish_budget(state, SharedBudget(trials=5))
    follower.look(now=True)
    assert follower.left == 3
    first.look(now=True)
    first.close()  # Its time is over.
    assert published_budget(state) == SharedBudget(trials=3, closed=True)
    assert not take(follower, 5) and follower.left == 0
    follower.close()
    assert first.left == 1


def test_ends_elsewhere_are_heard_once(study: Study, driver: Driver) -> None:
    state, heard = study.optuna(), list[int]()
    joiner = driver_in(study, joins=True)
    mine = Turns(state, driver, trials=4, on_ended_elsewhere=lambda t: heard.append(t.number))
    other = Turns(state, joiner, trials=4)
    trials = [*take(mine, 1), *take(other, 2)]
    for turns, trial in zip((mine, other, other), trials, strict=True):
        with turns.ending([trial]):
            state.tell(trial, 0.5)
    mine.look(now=True)
    mine.look(now=True)
    assert heard == [1, 2]


def test_looks_are_rare(study: Study, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(driver, "check", lambda: looks.append(1))
    turns = Turns(study.optuna(), driver, trials=4)
    for _ in range(50):
        turns.look()
    assert len(looks) == 1


def test_without_a_driver_the_study_is_ours(study: Study) -> None:
    turns = Turns(study.optuna(), None, trials=3)
    assert [t.number for t in take(turns, 2)] == [0, 1]
    turns.adopt(turns.orphans(running(study)))
    assert [t.number for t in take(turns, 9)] == [0, 1, 2]
    assert not turns.others_run()


def test_whose_ends_are_written_by_whom(study: Study, driver: Driver) -> None:
    """MLflow: a living driver writes its own, those of the dead are written for them."""
    joiner = driver_in(study, joins=True)
    state = study.optuna()
    for owner in (driver.id, joiner.id, "dead"):
        trial = state.ask()
        trial.set_user_attr(OWNER, owner)
        state.tell(trial, 0.5)
    state.add_trial(optuna.create_trial(value=0.1))  # By an older version, without a driver.
    turns, trials = Turns(state, driver, trials=9), state.get_trials(deepcopy=False)
    with joiner.registered():
        assert turns.settled(trials) == [0, 2, 3]
        assert [t.number for t in turns.of_the_dead(trials)] == [2]
    assert turns.settled(trials) == [0, 1, 2, 3]
    assert [t.number for t in turns.of_the_dead(trials)] == [1, 2]


def test_an_end_is_remembered_without_its_curve(study: Study) -> None:
    state = study.optuna()
    space: Any = SimpleNamespace(from_params=lambda params: {"lr": params["x"]})
    outcome = Outcome(
        status=Status.COMPLETE, curve=({"loss": 1.0}, {"loss": 0.5}), best_epoch=2, best_value=0.75,
        best_metrics={"f1": 0.5}, seconds=1.5,
    )  # fmt: skip
    trial = state.ask()
    trial.suggest_float("x", 1, 1)
    tell(state, trial, outcome)
    before = time.time()
    end = remembered(state.trials[0], space)
    assert end is not None and (end.number, end.settings) == (0, {"lr": 1.0})
    found = end.outcome
    assert (found.status, found.best_value, found.best_epoch) == (Status.COMPLETE, 0.75, 2)
    assert (found.best_metrics, found.seconds, found.curve) == ({"f1": 0.5}, 1.5, ())
    assert before - 10 < found.ended < before + 10
    state.add_trial(optuna.create_trial(value=0.1))
    assert remembered(state.trials[1], space) is None
