"""The curve of a trial whose end another home told MLflow for a driver that died: it comes with the
resume in the home that has it, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from core.report import Outcome, Status
from tuner.studies.outcomes import EndedTrial
from tuner.tracking.study_runs import CURVELESS, STATUS, StudyRuns

METRIC = "validation_top3_accuracy"
CURVE = tuple({METRIC: 0.1 * epoch} for epoch in (1, 2, 3))
Told = Callable[[], StudyRuns]


def trial(curve: tuple[dict[str, float], ...]) -> EndedTrial:
    outcome = Outcome(
        status=Status.COMPLETE, curve=curve, best_epoch=3, best_value=0.3, seconds=1.0, ended=9.0
    )
    return EndedTrial(number=0, settings={"lr": 0.1}, outcome=outcome)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def told(tmp_path: Path, uri: str) -> Told:
    """A session that knows what MLflow holds."""

    def start() -> StudyRuns:
        runs = StudyRuns(
            uri, experiment="drawn", artifacts=tmp_path / "artifacts", study="s",
            objective="top3_accuracy", floor=0.0,
        )  # fmt: skip
        runs.start_study({}, [], joined=False)
        return runs

    return start


def test_the_home_that_has_the_curve_writes_it_once(told: Told, uri: str) -> None:
    client = MlflowClient(uri)
    first = told()
    first.repair(trial(()))  # By a joiner, as Optuna remembers it.
    (run,) = client.search_runs([first.experiment_id], f"tags.`{STATUS}` = 'complete'")

    def steps() -> list[int]:
        return sorted(p.step for p in client.get_metric_history(run.info.run_id, METRIC))

    assert steps() == [] and run.info.status == "FINISHED"
    assert run.data.tags[CURVELESS] == "true"
    told().repair(trial(()))  # Another home without it changes nothing.
    assert client.get_run(run.info.run_id).data.tags[CURVELESS] == "true"
    for _ in range(2):
        told().repair(trial(CURVE))
        assert steps() == [1, 2, 3]
        found = client.get_run(run.info.run_id)
        assert found.info.status == "FINISHED" and found.data.tags[CURVELESS] == "false"
    assert len(client.search_runs([first.experiment_id])) == 2


def test_a_trial_with_its_curve_says_nothing_of_it(told: Told, uri: str) -> None:
    runs = told()
    runs.repair(trial(CURVE))
    runs.repair(trial(CURVE))
    client = MlflowClient(uri)
    (run,) = client.search_runs([runs.experiment_id], f"tags.`{STATUS}` = 'complete'")
    assert CURVELESS not in run.data.tags
    assert len(client.get_metric_history(run.info.run_id, METRIC)) == 3
