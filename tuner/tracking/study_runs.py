"""The runs of one study, as MLflow is told of them: a parent, and a child a trial.

A run's key is its tags STUDY and TRIAL, by which a lost run is found and never made twice. MLflow's
status: FINISHED for a complete or pruned trial, FAILED for a failed or infeasible one, KILLED for
one that waits to be resumed; the tag STATUS tells them apart, and REASON says why.
Every method may be called again after it failed in the middle: it looks first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.report import Outcome, Status

from .artifacts import S3, require_boto3
from .mlflow_store import (
    STUDY,
    TRIAL,
    artifact_location,
    log_to_run,
    open_client,
    open_experiment,
    quiet_mlflow,
    search_runs,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from ..studies.outcomes import EndedTrial

STATUS = "tuner.status"
REASON = "tuner.reason"
WINNER = "tuner.winner"
FRONT = "tuner.pareto_front"
CURVELESS = "tuner.curve_missing"
"""`true`: ended for a driver of another home, which has the curve and writes it at its resume."""
LEARNT_NOTHING = "tuner.learnt_nothing"
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
SOURCE = {"mlflow.source.name": "tuner search", "mlflow.source.type": "LOCAL"}
PARENT_KEY = "study"
"""The tag TRIAL of a parent run."""
_RUN_STATUS = {
    Status.COMPLETE: "FINISHED",
    Status.PRUNED: "FINISHED",
    Status.FAILED: "FAILED",
    Status.INFEASIBLE: "FAILED",
}


class StudyRuns:
    """What MLflow holds of a study. Used by one thread; arguments as of `tracking.Tracker`."""

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment: str,
        artifacts: Path | str,
        study: str,
        objective: str,
        floor: float,
    ) -> None:
        self.experiment_id = ""
        self.parent_run_id = ""
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._artifacts = artifacts
        self._study = study
        self._objective = objective
        self._floor = floor
        self._runs: dict[int, str] = {}
        self._ended: set[int] = set()
        self._open: set[int] = set()
        """Trials whose run is RUNNING."""
        self._curveless: set[int] = set()
        """Trials whose end another home wrote for a driver that died: it did not have the curve."""
        self._tried: set[int] = set()
        """Trials for which a run was to be made."""

    def start_study(
        self, params: Mapping[str, Any], files: Sequence[Path], *, joined: bool
    ) -> None:
        """Find or make the parent run with its parameters and files, and learn which trials have
        runs. `joined`: another process leads the study; its parent's status is left as it is."""
        quiet_mlflow()
        client = open_client(self._tracking_uri)
        location = artifact_location(self._artifacts, self._tracking_uri, self._experiment)
        experiment = open_experiment(client, self._experiment, location)
        if experiment.artifact_location.startswith(S3):
            require_boto3(experiment.artifact_location)  # A server may have chosen it.
        self.experiment_id = experiment.experiment_id
        parent_run_id = self.learn(adopt=not joined)
        if not parent_run_id:
            run = client.create_run(
                self.experiment_id,
                run_name=self._study,
                tags={STUDY: self._study, TRIAL: PARENT_KEY, **SOURCE},
            )
            parent_run_id = run.info.run_id
        elif not joined:
            client.update_run(parent_run_id, status="RUNNING")
        known = client.get_run(parent_run_id).data.params
        missing = {key: value for key, value in params.items() if key not in known}
        log_to_run(client, parent_run_id, params=missing)
        there = {file.path for file in client.list_artifacts(parent_run_id)} if files else set()
        for path in files:
            if path.name not in there:
                client.log_artifact(parent_run_id, str(path))
        self.parent_run_id = parent_run_id

    def learn(self, *, adopt: bool = False) -> str:
        """Which runs there are; returns the parent's id. Of two with one key, made by a call whose
        answer was lost, one stays. `adopt`: those that are RUNNING are closed by us in the end."""
        client = open_client(self._tracking_uri)
        by_key: dict[str, list[Any]] = {}
        for run in search_runs(client, self.experiment_id, f"tags.`{STUDY}` = '{self._study}'"):
            by_key.setdefault(run.data.tags[TRIAL], []).append(run)
        named = Counter(run.data.tags.get(PARENT) for runs in by_key.values() for run in runs)
        mine = {self.parent_run_id, *self._runs.values()}

        def rank(run: Any) -> tuple[bool, int, bool, int]:
            known, ended = run.info.run_id in mine, STATUS in run.data.tags
            return not known, -named[run.info.run_id], not ended, run.info.start_time

        for runs in by_key.values():
            runs.sort(key=rank)
            for run in runs[1:]:
                client.delete_run(run.info.run_id)
        parents = by_key.pop(PARENT_KEY, [])
        ends = {status.value for status in Status}
        for key, (run, *_) in by_key.items():
            number, running = int(key), run.info.status == "RUNNING"
            self._runs[number] = run.info.run_id
            # The tag is written just before the run is closed: a kill may have come between.
            if run.data.tags.get(STATUS) in ends and not running:
                self._ended.add(number)
            if run.data.tags.get(CURVELESS) == "true":
                self._curveless.add(number)
            if running and adopt:
                self._open.add(number)
        return parents[0].info.run_id if parents else ""

    def end_study(self, status: str, milliseconds: int) -> None:
        client = open_client(self._tracking_uri)
        client.set_terminated(self.parent_run_id, status, end_time=milliseconds)

    def settle(self, *, troubled: bool) -> None:
        """Close runs without an end. `troubled`: an answer may have been lost, and a run be there
        twice."""
        if troubled:
            self.learn()
        client = open_client(self._tracking_uri)
        for number in sorted(self._open):
            # One that another process took over has its end from there; a person may delete one.
            info = client.get_run(self._runs[number]).info
            if info.status == "RUNNING" and info.lifecycle_stage == "active":
                self.interrupt(number)
        self._open.clear()

    def withdraw(self) -> None:
        """Delete the parent run, unless it has trials."""
        client = open_client(self._tracking_uri)
        if self.parent_run_id and not self._runs:
            run = client.get_run(self.parent_run_id)
            if run.info.lifecycle_stage == "active":
                client.delete_run(self.parent_run_id)

    def mark_winner(self, number: int, study: str) -> None:
        """Alone among the trials of both parts: more trials may have another winner."""
        client = open_client(self._tracking_uri)

        def runs_with(name: str, tag: str, value: object) -> list[Any]:
            query = f"tags.`{STUDY}` = '{name}' and tags.`{tag}` = '{value}'"
            return search_runs(client, self.experiment_id, query)

        for name in {study, self._study}:
            for run in runs_with(name, WINNER, "true"):
                client.delete_tag(run.info.run_id, WINNER)
        for run in runs_with(study, TRIAL, number):
            log_to_run(client, run.info.run_id, tags={WINNER: "true"})

    def mark_front(self, numbers: Collection[int], study: str) -> None:
        """Alone among the trials of a part: further trials may have another front."""
        client = open_client(self._tracking_uri)
        for run in search_runs(client, self.experiment_id, f"tags.`{STUDY}` = '{study}'"):
            number = run.data.tags[TRIAL]
            if number.isdecimal() and int(number) in numbers:
                log_to_run(client, run.info.run_id, tags={FRONT: "true"})
            elif FRONT in run.data.tags:
                client.delete_tag(run.info.run_id, FRONT)

    def log_study(
        self, metrics: Mapping[str, float], tags: Mapping[str, Any], milliseconds: int
    ) -> None:
        """A metric that has the value already gets no further point."""
        client = open_client(self._tracking_uri)
        known = client.get_run(self.parent_run_id).data.metrics
        news = {key: value for key, value in metrics.items() if known.get(key) != float(value)}
        log_to_run(
            client, self.parent_run_id, points=[(news, 0)], tags=tags, milliseconds=milliseconds
        )

    def log_files(self, paths: Sequence[Path]) -> None:
        client = open_client(self._tracking_uri)
        for path in paths:
            client.log_artifact(self.parent_run_id, str(path))

    def start_trial(self, number: int) -> None:
        client = open_client(self._tracking_uri)
        if number not in self._runs and number in self._tried:
            self.learn()  # It may have been made, and the answer lost.
        self._tried.add(number)
        if number in self._runs:
            client.update_run(self._runs[number], status="RUNNING")
        else:
            self._runs[number] = self._create_run(client, number)
        self._open.add(number)

    def _create_run(self, client: MlflowClient, number: int) -> str:
        run = client.create_run(
            self.experiment_id,
            run_name=f"{self._study} trial {number}",
            tags={
                STUDY: self._study,
                TRIAL: str(number),
                PARENT: self.parent_run_id,
                **SOURCE,
            },
        )
        return str(run.info.run_id)

    def end_trial(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        if number not in self._runs:
            self.start_trial(number)
        summary = {**outcome.best_metrics, "device_seconds": outcome.seconds}
        tags: dict[str, Any] = {STATUS: outcome.status.value}
        curveless = outcome.best_epoch is not None and not outcome.curve
        if curveless or number in self._curveless:
            tags[CURVELESS] = str(curveless).lower()
        if outcome.best_value is not None and outcome.best_epoch is not None:
            summary[f"best_validation_{self._objective}"] = outcome.best_value
            summary["best_epoch"] = outcome.best_epoch
            if outcome.best_value <= self._floor:
                tags[LEARNT_NOTHING] = "true"
        if outcome.reason:
            tags |= {REASON: outcome.reason, NOTE: f"{outcome.status.value}: {outcome.reason}"}
        curves = [(metrics, epoch) for epoch, metrics in enumerate(outcome.curve, 1)]
        run_id = self._runs[number]
        client = open_client(self._tracking_uri)
        # The outcome's own time: written again after a kill, a point is the same point.
        milliseconds = int(outcome.ended * 1000)
        log_to_run(
            client, run_id, points=[*curves, (summary, 0)], params=settings, tags=tags,
            milliseconds=milliseconds,
        )  # fmt: skip
        client.set_terminated(run_id, _RUN_STATUS[outcome.status], end_time=milliseconds)
        if not curveless:
            self._curveless.discard(number)
        self._ended.add(number)
        self._open.discard(number)

    def repair(self, trial: EndedTrial) -> None:
        late_curve = trial.number in self._curveless and trial.outcome.curve
        if trial.number not in self._ended or late_curve:
            self.end_trial(trial.number, trial.settings, trial.outcome)

    def interrupt(self, number: int) -> None:
        if number in self._runs and number not in self._ended:
            client = open_client(self._tracking_uri)
            log_to_run(client, self._runs[number], tags={STATUS: "interrupted"})
            client.set_terminated(self._runs[number], "KILLED")
            self._open.discard(number)
