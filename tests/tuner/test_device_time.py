"""How device time is counted over sessions, and that a spent budget starts nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher

from tuner.budgets.device_time import (
    FEATURES,
    FINALISTS,
    PREFIX,
    SAVE_SECONDS,
    WALL,
    DeviceMeter,
    devices_of_trial,
    hours_text,
    metered,
)
from tuner.spaces.file import parse_space
from tuner.studies.outcomes import OutcomeLog
from tuner.trials.cluster import Machine, Workers
from tuner.trials.searcher import Budget, CohortSearcher

pytestmark = pytest.mark.usefixtures("quiet_optuna")

MACHINE = Machine(cpus=8.0, gpus=0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(direction="maximize")


def meter_of(study: optuna.Study, clock: Clock, **other: Any) -> DeviceMeter:
    return DeviceMeter(study, clock=clock, **{"devices": 1.0, **other})


@pytest.mark.parametrize(
    ("workers", "devices"),
    [
        (Workers(count=1, cpus=8, gpus=0, machines=(MACHINE,)), 1.0),
        (Workers(count=1, cpus=2, gpus=0, per_trial=4, machines=(MACHINE,)), 1.0),
        (Workers(count=2, cpus=2, gpus=0, per_trial=2, machines=(MACHINE,)), 0.5),
        (Workers(count=2, cpus=4, gpus=1, machines=(Machine(cpus=8, gpus=2),)), 1.0),
        (Workers(count=4, cpus=2, gpus=0.5, machines=(Machine(cpus=8, gpus=2),)), 0.5),
        (Workers(count=1, cpus=4, gpus=1, per_trial=2, machines=(Machine(cpus=8, gpus=2),)), 2.0),
    ],
)
def test_a_device_is_a_gpu_or_a_machine_without(workers: Workers, devices: float) -> None:
    assert devices_of_trial(workers) == devices


def test_what_runs_side_by_side_counts_twice(study: optuna.Study, clock: Clock) -> None:
    meter = meter_of(study, clock, devices=0.5)
    meter.begin("a")
    clock.now += 10
    meter.begin("b")
    clock.now += 6
    assert meter.used == pytest.approx(0.5 * (16 + 6)), "those that run count"
    meter.end("a", numbers=[3, 4])
    clock.now += 4
    meter.end("b", numbers=[5])
    assert meter.sums() == {"trials": pytest.approx(0.5 * (16 + 10))}
    assert meter.cohorts == [((3, 4), 16.0), ((5,), 10.0)]
    with pytest.raises(RuntimeError), meter.busy(FEATURES, devices=3.0):
        clock.now += 2
        raise RuntimeError
    assert meter.sums()["features"] == pytest.approx(6.0), "a failure used them, too"


def test_sessions_and_drivers_add_up(study: optuna.Study, clock: Clock) -> None:
    first = meter_of(study, clock)
    first.add(FEATURES, 30.0)
    first.add(WALL, 500.0)
    second = meter_of(study, clock, before=100.0, limit=200.0)
    assert second.used == 130.0 and not second.spent
    second.begin("c")
    clock.now += 20
    first.add(FINALISTS, 40.0)  # Another driver, at the same time.
    clock.now += 10
    assert second.used == 200.0 and second.spent
    assert second.text() == "0.056 of 0.056 device-hours"
    assert meter_of(study, clock).text() == "" and not meter_of(study, clock).spent


def test_a_kill_loses_at_most_half_a_minute(study: optuna.Study, clock: Clock) -> None:
    meter = meter_of(study, clock)

    def kept() -> float:
        sums = [value for key, value in study.user_attrs.items() if key.startswith(PREFIX)]
        return sum(one.get("trials", 0.0) for one in sums)

    meter.begin("long")
    for _ in range(100):
        clock.now += 1
        meter.save(at_most_every=SAVE_SECONDS)
        assert clock.now - 100 - kept() <= SAVE_SECONDS
    assert kept() > 0


def test_finalists_hold_as_many_devices_as_there_are_jobs(
    study: optuna.Study, clock: Clock
) -> None:
    meter = meter_of(study, clock)
    workers = Workers(count=4, cpus=2, gpus=1, machines=(Machine(cpus=8, gpus=4),))

    def run(work: Any, payloads: Any, totals: Any) -> list[Any]:
        clock.now += 5
        return list(payloads)

    counted = metered(run, meter, workers)
    assert counted(lambda *_: None, [1, 2], {}) == [1, 2]
    assert meter.sums()[FINALISTS] == 10.0
    counted(lambda *_: None, list(range(9)), {})
    assert meter.sums()[FINALISTS] == 10.0 + 20.0, "no more than there are"


@pytest.mark.parametrize(("limit", "starts"), [(None, True), (50.0, True), (40.0, False)])
def test_a_spent_budget_starts_no_trial(
    study: optuna.Study, clock: Clock, tmp_path: Path, limit: float | None, starts: bool
) -> None:
    space = parse_space({"name": "s", "parameters": {"backbone": "ffn", "lr": [0.1, 0.2]}})
    meter = meter_of(study, clock, limit=limit)
    meter.add(FEATURES, 45.0)
    searcher = CohortSearcher(
        study,
        space,
        budget=Budget(trials=4, meter=meter),
        features={},
        channel=None,  # type: ignore[arg-type]
        log=OutcomeLog(tmp_path),
        watchers=[],
        seed=0,
        rungs=[],
    )
    assert searcher.has_work is starts
    if not starts:
        assert searcher.suggest("x") == Searcher.FINISHED
        assert not searcher.interrupted and not study.trials


def test_hours_are_told_in_two_digits() -> None:
    said = [hours_text(seconds) for seconds in (122, 4321, 36_000, 1_000_000)]
    assert said == ["0.034", "1.2", "10", "278"]
