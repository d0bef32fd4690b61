"""Studies that tests write to an MLflow server, and what must then be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from core.report import Outcome, Status
from tuner.tracking.tracker import Tracker

EPOCHS = 3


def tracker_of(address: str, study: str, **options: Any) -> Tracker:
    settings: dict[str, Any] = {
        "experiment": "posters", "artifacts": Path("/nowhere"), "study": study,
        "objective": "top3_accuracy", "floor": 0.3,
    }  # fmt: skip
    return Tracker(address, **(settings | options))


def outcome(number: int, status: Status = Status.COMPLETE) -> Outcome:
    """Of a trial with values of its own: one trial's points are not taken for another's."""
    curve = tuple(
        {"validation_top3_accuracy": 0.4 + number / 10 + epoch / 100} for epoch in range(EPOCHS)
    )
    return Outcome(
        status=status,
        curve=curve,
        best_epoch=EPOCHS,
        best_value=curve[-1]["validation_top3_accuracy"],
        seconds=1.5,
        ended=1_700_000_000.25 + number,
    )


def runs_of(server: str, study: str) -> tuple[list[Any], dict[int, list[Any]]]:
    """Parents, and children by trial number, as MLflow shows them."""
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("posters")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`tuner.study` = '{study}'")
    children: dict[int, list[Any]] = {}
    for run in runs:
        if run.data.tags["tuner.trial"] != "study":
            children.setdefault(int(run.data.tags["tuner.trial"]), []).append(run)
    return [run for run in runs if run.data.tags["tuner.trial"] == "study"], children


def assert_written(server: str, study: str, numbers: range) -> Any:
    """One parent, one child a trial with one point an epoch; returns the parent."""
    (parent,), children = runs_of(server, study)
    assert sorted(children) == list(numbers)
    client = MlflowClient(server)
    for number, runs in children.items():
        (child,) = runs
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.info.status, child.data.tags["tuner.status"]) == ("FINISHED", "complete")
        assert child.data.params["lr"] == str(number)
        points = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
        expected = [c["validation_top3_accuracy"] for c in outcome(number).curve]
        points.sort(key=lambda point: point.step)
        assert [point.value for point in points] == pytest.approx(expected)
        assert [point.step for point in points] == [1, 2, 3]
        assert {point.timestamp for point in points} == {child.info.end_time}
    return parent


def write_trials(tracker: Tracker, numbers: range) -> None:
    for number in numbers:
        tracker.trial_started(number, {"lr": number})
        tracker.trial_ended(number, {"lr": number}, outcome(number))
