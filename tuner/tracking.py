"""A study in MLflow: one parent run, one child run a trial, found by a key and never made twice.

Writing happens in one thread beside the search, in batches: one process and one thread write,
since processes that open a new sqlite store at once collide. A run's key is its tags STUDY and
TRIAL; a resumed study finds its runs by them. MLflow's status: FINISHED for a complete or
pruned trial, FAILED for a failed or infeasible one, KILLED for one that waits to be resumed; the
tag STATUS tells them apart, and REASON says why.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError
from core.report import Outcome, Status

from .addresses import first_line, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from .outcomes import EndedTrial

STUDY = "tuner.study"
TRIAL = "tuner.trial"
STATUS = "tuner.status"
REASON = "tuner.reason"
WINNER = "tuner.winner"
LEARNT_NOTHING = "tuner.learnt_nothing"
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
SOURCE = {"mlflow.source.name": "tuner search", "mlflow.source.type": "LOCAL"}

RETRY_SECONDS = 120
"""How long a failing write is tried again before the study is told."""
MAX_TEXT = 5000
"""MLflow refuses longer tags."""
_RUN_STATUS = {
    Status.COMPLETE: "FINISHED",
    Status.PRUNED: "FINISHED",
    Status.FAILED: "FAILED",
    Status.INFEASIBLE: "FAILED",
}


class Tracker:
    """Writes a study's runs; a `Watcher` of the searcher.

    Args:
        tracking_uri: MLflow's address.
        experiment: made if it is not there.
        artifacts: where a new experiment in a local store keeps artifacts.
        study: the study's name.
        objective: name of the validation metric that is a trial's value.
        floor: the objective that a model reaches without looking: trials that do not exceed it
            are tagged as having learnt nothing.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment: str,
        artifacts: Path,
        study: str,
        objective: str,
        floor: float,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.experiment_id = ""
        self.parent_run_id = ""
        self.ended = False
        self._artifacts = artifacts
        self._study = study
        self._objective = objective
        self._floor = floor
        self._runs: dict[int, str] = {}
        self._ended: set[int] = set()
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    # ---- the study ------------------------------------------------------------------------

    def start_study(self, params: Mapping[str, Any], artifacts: Sequence[Path] = ()) -> None:
        """Find or make the parent run, and learn which trials have runs."""
        self._jobs.put(lambda: self._start_study(params, artifacts))

    def end_study(self, status: str = "FINISHED") -> None:
        """Close the parent run; what is still to be written is written first."""
        self.ended = True
        self._jobs.put(lambda: self._client().set_terminated(self.parent_run_id, status))
        self.flush()

    def log_study(self, metrics: Mapping[str, float], tags: Mapping[str, Any]) -> None:
        """Metrics and tags of the parent run."""
        self._jobs.put(lambda: self._log(self.parent_run_id, [_flat(metrics, 0)], {}, tags))

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Files beside the parent run."""
        for path in paths:
            self._jobs.put(
                lambda path=path: self._client().log_artifact(  # type: ignore[misc]
                    self.parent_run_id, str(path)
                )
            )

    def withdraw_study(self) -> None:
        """Delete the parent run of a study that never began, unless MLflow is what failed."""
        self._jobs.put(lambda: self._client().delete_run(self.parent_run_id))
        self._jobs.join()

    # ---- trials: a Watcher ----------------------------------------------------------------

    def trial_started(self, number: int, settings: Mapping[str, Any]) -> None:
        self._jobs.put(lambda: self._start_trial(number))

    def cohort_progress(
        self, numbers: Sequence[int], epoch: int, values: Mapping[int, float]
    ) -> None:
        """Nothing: a trial's curve is written at its end, in one batch."""

    def trial_ended(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        self._jobs.put(lambda: self._end_trial(number, settings, outcome))

    def mark_winner(self, number: int, study: str | None = None) -> None:
        """Tag the run of the trial that won, of this study or of the other part of it."""
        self._jobs.put(lambda: self._mark_winner(number, study or self._study))

    def repair(self, ended: Mapping[int, EndedTrial], numbers: Sequence[int]) -> None:
        """Write the ends that MLflow missed, of trials that have one (`numbers`)."""
        for number in numbers:
            if number in ended:
                self._jobs.put(lambda trial=ended[number]: self._repair(trial))  # type: ignore[misc]

    def trials_interrupted(self, numbers: Sequence[int]) -> None:
        """Trials that a later session will take up again: no run is left RUNNING meanwhile."""
        for number in numbers:
            self._jobs.put(lambda number=number: self._interrupt(number))  # type: ignore[misc]

    # ---- the writer -----------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until all is written. Raises what the writer could not overcome."""
        self._jobs.join()
        if self._error is not None:
            raise InputError(
                f"MLflow could not be written ({first_line(self._error)})",
                where=f"--tracking-uri {without_password(self.tracking_uri)}",
                hint="trials that ended are kept: tuner resume writes what is missing",
            ) from self._error

    def close(self) -> None:
        """End the writer after what is queued."""
        self._jobs.put(None)
        self._thread.join(timeout=RETRY_SECONDS)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    self._with_retries(job)
            except Exception as error:  # Kept for `flush`: a thread has nobody to raise to.
                self._error = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _with_retries(self, job: Callable[[], None]) -> None:
        give_up = time.monotonic() + RETRY_SECONDS
        pause = 0.2
        while True:
            try:
                return job()
            except Exception as error:
                if time.monotonic() + pause > give_up or not _may_pass(error):
                    raise
                time.sleep(pause)
                pause = min(pause * 2, 10)

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.tracking_uri)

    def _start_study(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        quiet_mlflow()
        client = self._client()
        self.experiment_id = _experiment(client, self.experiment, self._artifacts)
        known = {
            run.data.tags[TRIAL]: run
            for run in _search(client, self.experiment_id, f"tags.`{STUDY}` = '{self._study}'")
        }
        parent = known.pop("study", None)
        self._runs = {int(number): run.info.run_id for number, run in known.items()}
        ends = {status.value for status in Status}
        self._ended = {
            int(number)
            for number, run in known.items()
            # The tag is written just before the run is closed: a kill may have come between.
            if run.data.tags.get(STATUS) in ends and run.info.status != "RUNNING"
        }
        if parent is None:
            run = client.create_run(
                self.experiment_id,
                run_name=self._study,
                tags={STUDY: self._study, TRIAL: "study", **SOURCE},
            )
            self.parent_run_id = run.info.run_id
            self._log(self.parent_run_id, [], params, {})
            for path in artifacts:
                client.log_artifact(self.parent_run_id, str(path))
        else:
            self.parent_run_id = parent.info.run_id
            client.update_run(self.parent_run_id, status="RUNNING")

    def _mark_winner(self, number: int, study: str) -> None:
        """Alone among the trials of both parts: more trials may have another winner."""
        client = self._client()

        def runs_with(name: str, tag: str, value: object) -> list[Any]:
            query = f"tags.`{STUDY}` = '{name}' and tags.`{tag}` = '{value}'"
            return _search(client, self.experiment_id, query)

        for name in {study, self._study}:
            for run in runs_with(name, WINNER, "true"):
                client.delete_tag(run.info.run_id, WINNER)
        for run in runs_with(study, TRIAL, number):
            self._log(run.info.run_id, [], {}, {WINNER: "true"})

    def _start_trial(self, number: int) -> None:
        client = self._client()
        if number in self._runs:
            client.update_run(self._runs[number], status="RUNNING")
            return
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
        self._runs[number] = run.info.run_id

    def _end_trial(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        if number not in self._runs:
            self._start_trial(number)
        summary = {**outcome.best_metrics, "device_seconds": outcome.seconds}
        tags: dict[str, Any] = {STATUS: outcome.status.value}
        if outcome.best_value is not None and outcome.best_epoch is not None:
            summary[f"best_validation_{self._objective}"] = outcome.best_value
            summary["best_epoch"] = outcome.best_epoch
            if outcome.best_value <= self._floor:
                tags[LEARNT_NOTHING] = "true"
        if outcome.reason:
            tags |= {REASON: outcome.reason, NOTE: f"{outcome.status.value}: {outcome.reason}"}
        curves = [_flat(metrics, epoch) for epoch, metrics in enumerate(outcome.curve, 1)]
        run_id = self._runs[number]
        # The outcome's own time: written again after a kill, a point is the same point.
        milliseconds = int(outcome.ended * 1000)
        points = [*curves, _flat(summary, 0)]
        self._log(run_id, points, settings, tags, milliseconds=milliseconds)
        self._client().set_terminated(run_id, _RUN_STATUS[outcome.status], end_time=milliseconds)

    def _repair(self, trial: EndedTrial) -> None:
        if trial.number not in self._ended:
            self._end_trial(trial.number, trial.settings, trial.outcome)

    def _interrupt(self, number: int) -> None:
        if number in self._runs:
            self._log(self._runs[number], [], {}, {STATUS: "interrupted"})
            self._client().set_terminated(self._runs[number], "KILLED")

    def _log(
        self,
        run_id: str,
        metrics: Sequence[tuple[Mapping[str, float], int]],
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        *,
        milliseconds: int | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = milliseconds or int(time.time() * 1000)
        points = [
            Metric(key, float(value), now, step)
            for values, step in metrics
            for key, value in values.items()
        ]
        entries = [Param(key, _text(value)) for key, value in params.items()]
        labels = [RunTag(key, _text(value)) for key, value in tags.items()]
        # MLflow takes at most 1,000 metrics (and 1,000 things in all) in one call.
        head, rest = points[:800], points[800:]
        self._client().log_batch(run_id, metrics=head, params=entries[:99], tags=labels[:99])
        for start in range(0, len(rest), 1000):
            self._client().log_batch(run_id, metrics=rest[start : start + 1000])


def quiet_mlflow() -> None:
    """MLflow's own messages off the screen; its warnings stay. (It sets its level on import.)"""
    import mlflow  # noqa: F401

    # With a server it would print two lines a run, and ask the server for each of them.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def tracked_studies(uri: str, experiment: str) -> set[str]:
    """Names of the studies that an experiment holds. The address has been checked."""
    file = uri.removeprefix("sqlite:///").split("?")[0]
    if uri.startswith("sqlite:///") and not Path(file).exists():
        return set()  # MLflow would make it.
    quiet_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return set()
    parents = _search(client, found.experiment_id, f"tags.`{TRIAL}` = 'study'")
    return {run.data.tags[STUDY] for run in parents}


def _experiment(client: MlflowClient, name: str, artifacts: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    local = client.tracking_uri.startswith("sqlite:")
    location = (artifacts / name).as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=location))


def _search(client: MlflowClient, experiment_id: str, query: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _flat(metrics: Mapping[str, float], step: int) -> tuple[Mapping[str, float], int]:
    return metrics, step


def _text(value: Any) -> str:
    return str(value)[:MAX_TEXT]


def _may_pass(error: Exception) -> bool:
    """Whether trying again can help: not where MLflow says that the request itself is wrong."""
    code = getattr(error, "error_code", "")
    return code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
