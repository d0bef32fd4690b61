"""The budget of device time that all drivers of a study obey: the one of the session that leads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from tuner.budgets.device_time import TRIALS, DeviceMeter
from tuner.drivers.joining import _within
from tuner.drivers.presence import Driver
from tuner.drivers.turns import SharedBudget, Turns, publish_budget, published_budget
from tuner.spaces.file import parse_space
from tuner.studies.parts import make_plans
from tuner.studies.study import Study
from tuner.trials import on_tune
from tuner.trials.cluster import Machine, Workers
from tuner.trials.searcher import Budget, CohortSearcher

from .small_drivers import driver_in, study_in

SPACE = {
    "name": "s",
    "trials": 9,
    "sampler": "random",
    "pruner": "none",
    "parameters": {"backbone": "ffn", "lr": {"low": 0.01, "high": 1.0}, "epochs": 2},
}
CPU = Workers(count=1, cpus=2, gpus=0, machines=(Machine(cpus=2),))
HOUR = 3600.0


@pytest.fixture
def study(tmp_path: Path) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return study_in(tmp_path, "shared")


@pytest.fixture
def joiner(study: Study) -> Iterator[Driver]:
    driver = driver_in(study, joins=True)
    with driver.registered():
        yield driver


def turns_of(study: Study, driver: Driver, meter: DeviceMeter, **plan: Any) -> Turns:
    """As a session makes them."""
    space = parse_space(SPACE)
    made, _ = make_plans(space, **plan)
    nobody: Any = SimpleNamespace()
    return on_tune._turns_of(study.optuna(), space, made, driver, meter, nobody, nobody)


def test_a_joiner_obeys_a_budget_that_grows_while_it_runs(study: Study, joiner: Driver) -> None:
    """`tuner resume STUDY --device-hours MORE` beside it; its own plan has the record's."""
    state = study.optuna()
    publish_budget(state, SharedBudget(trials=9, device_seconds=HOUR))
    meter = DeviceMeter(state, devices=1.0, limit=HOUR)
    turns = turns_of(study, joiner, meter, device_hours=1)
    searcher = CohortSearcher(
        state, parse_space(SPACE), budget=Budget(trials=9, meter=meter), features={}, turns=turns,
        channel=None, log=None, watchers=[], seed=0, rungs=(),  # type: ignore[arg-type]
    )  # fmt: skip
    assert searcher.has_work
    meter.add(TRIALS, HOUR)
    assert meter.spent and not searcher.has_work
    publish_budget(state, SharedBudget(trials=9, device_seconds=2 * HOUR))
    turns.look(now=True)
    assert meter.limit == 2 * HOUR and searcher.has_work
    publish_budget(state, SharedBudget(trials=9))  # Without a limit.
    turns.look(now=True)
    assert meter.limit is None and not meter.spent


def test_a_joiner_begins_with_the_budget_that_is_published(study: Study) -> None:
    plan, _ = make_plans(parse_space(SPACE), device_hours=1)
    plan = _within(plan, SharedBudget(trials=4, device_seconds=2 * HOUR))
    assert (plan.trials, plan.device_seconds) == (4, 2 * HOUR)
    assert _within(plan, SharedBudget(trials=4)).device_seconds is None


def test_the_first_driver_follows_its_own_plan(study: Study) -> None:
    state = study.optuna()
    publish_budget(state, SharedBudget(trials=1, device_seconds=HOUR))
    with (first := driver_in(study)).registered():
        meter = DeviceMeter(state, devices=1.0, limit=5 * HOUR)
        turns = turns_of(study, first, meter, device_hours=5)
        turns.look(now=True)
        assert meter.limit == 5 * HOUR and turns.left == 9


def test_its_budget_is_published_with_what_is_left_of_it_at_the_end(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PublishedError(Exception):
        """Far enough: what comes next needs Ray."""

    def stop() -> None:
        raise PublishedError

    monkeypatch.setattr(on_tune, "start_channel", stop)
    study.record.__dict__["seed"] = 0
    space = parse_space(SPACE)
    plan, _ = make_plans(space, device_hours=3)
    tracker: Any = SimpleNamespace(repair=lambda *_: None)
    with (first := driver_in(study)).registered(), pytest.raises(PublishedError):
        on_tune.run_trials(
            study, space, None, plan, CPU, features={}, tracker=tracker, view=None, driver=first  # type: ignore[arg-type]
        )  # fmt: skip
    state = study.optuna()
    assert published_budget(state) == SharedBudget(trials=9, device_seconds=3 * HOUR)
    turns = Turns(state, first, trials=9)
    turns.close()
    closed = SharedBudget(trials=9, device_seconds=3 * HOUR, closed=True)
    assert published_budget(state) == closed


def test_what_an_earlier_version_published_has_no_limit(study: Study) -> None:
    study.optuna().set_user_attr("budget", {"trials": 3, "closed": False})
    assert published_budget(study.optuna()) == SharedBudget(trials=3)
