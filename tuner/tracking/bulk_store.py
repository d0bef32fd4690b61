"""MLflow's database store, with quick ways to make, log to and end a run.

MLflow's own makes an object of each value, commits metrics, parameters and tags apart, and reads a
run and its experiment whole to change a line. Here each table gets one statement, for the same rows
(tests/contracts/test_bulk_store.py). All else is as it is there.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from mlflow.entities import (
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunStatus,
    RunTag,
    SourceType,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.store.tracking.dbmodels.models import (
    SqlLatestMetric,
    SqlMetric,
    SqlParam,
    SqlRun,
    SqlTag,
)
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.uri import append_to_uri_path
from mlflow.utils.validation import (
    _validate_batch_log_data,
    _validate_batch_log_limits,
    _validate_param_keys_unique,
    _validate_run_id,
)
from sqlalchemy import Table, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

Row = dict[str, Any]

_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_AGE = ("step", "timestamp", "value")
"""By which MLflow says which of two values of a metric is the later one."""


class BulkStore(SqlAlchemyStore):
    """A `SqlAlchemyStore` of sqlite or PostgreSQL. What is rarely asked for goes to MLflow's own
    methods: a run without a name, a new name, metrics of models."""

    def create_run(
        self,
        experiment_id: str,
        user_id: str,
        start_time: int,
        tags: Sequence[RunTag],
        run_name: str | None,
    ) -> Run:
        """A RUNNING run. Raises MlflowException for an unknown or deleted experiment."""
        labels = {tag.key: tag.value for tag in tags or ()}
        if not run_name or MLFLOW_RUN_NAME in labels:
            made: Run = super().create_run(experiment_id, user_id, start_time, tags, run_name)
            return made
        labels[MLFLOW_RUN_NAME] = run_name
        run_id = uuid.uuid4().hex
        with self.ManagedSessionMaker(read_only=False) as session:
            experiment = self._get_experiment(session, experiment_id, ViewType.ALL)
            self._check_experiment_is_active(experiment)
            run = SqlRun(
                run_uuid=run_id,
                name=run_name,
                experiment_id=experiment.experiment_id,
                artifact_uri=append_to_uri_path(
                    experiment.artifact_location, run_id, self.ARTIFACTS_FOLDER_NAME
                ),
                source_type=SourceType.to_string(SourceType.UNKNOWN),
                source_name="",
                source_version="",
                entry_point_name="",
                user_id=user_id,
                status=RunStatus.to_string(RunStatus.RUNNING),
                start_time=start_time,
                lifecycle_stage=LifecycleStage.ACTIVE,
            )
            session.add(run)
            session.flush()
            _write(session, SqlTag.__table__, _rows(run_id, labels))
            data = RunData(tags=[RunTag(key, value) for key, value in labels.items()])
            return Run(_info_of(run), data, RunInputs([]))

    def update_run_info(
        self, run_id: str, run_status: int | None, end_time: int | None, run_name: str | None
    ) -> RunInfo:
        """Change a run's status and end. Raises MlflowException for an unknown or deleted run."""
        if run_name:
            info: RunInfo = super().update_run_info(run_id, run_status, end_time, run_name)
            return info
        with self.ManagedSessionMaker(read_only=False) as session:
            run = self._get_run(session, run_id)
            self._check_run_is_active(run)
            if run_status is not None:
                run.status = RunStatus.to_string(run_status)
            if end_time is not None:
                run.end_time = end_time
            return _info_of(run)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric],
        params: Sequence[Param],
        tags: Sequence[RunTag],
    ) -> None:
        """Log all of it, or nothing where MLflow refuses a part.

        Raises MlflowException for an unknown or deleted run, a name or text that MLflow does not
        take, a parameter that has another value already. A point that is there stays one.
        """
        if not all(map(_is_usual, metrics)) or any(tag.key == MLFLOW_RUN_NAME for tag in tags):
            super().log_batch(run_id, metrics, params, tags)
            return
        _validate_run_id(run_id)
        one_a_key = list({metric.key: metric for metric in metrics}.values())
        _, params, tags = _validate_batch_log_data(one_a_key, params, tags)
        _validate_batch_log_limits(metrics, params, tags)
        _validate_param_keys_unique(params)
        points = [self._point(run_id, metric) for metric in metrics]
        with self.ManagedSessionMaker(read_only=False) as session:
            self._check_run_is_active(self._get_run(session, run_id))
            _write_params(session, run_id, params)
            _write_points(session, points)
            labels = {tag.key: tag.value for tag in tags}
            _write(session, SqlTag.__table__, _rows(run_id, labels), replace=("value",))

    def _point(self, run_id: str, metric: Metric) -> Row:
        is_nan, value = self.sanitize_metric_value(metric.value)
        return {
            "run_uuid": run_id, "key": metric.key, "step": metric.step, "value": value,
            "timestamp": metric.timestamp, "is_nan": is_nan,
        }  # fmt: skip


def _is_usual(metric: Metric) -> bool:
    """Whether its name is all that is left to check, and it goes into the usual tables only."""
    return (
        isinstance(metric.value, float)
        and isinstance(metric.step, int)
        and isinstance(metric.timestamp, int)
        and metric.timestamp >= 0
        and metric.model_id is None
    )


def _info_of(run: Any) -> RunInfo:
    """Of a `SqlRun`; MLflow's own way there reads its metrics, too."""
    return RunInfo(
        run_id=run.run_uuid,
        run_name=run.name,
        experiment_id=str(run.experiment_id),
        user_id=run.user_id,
        status=run.status,
        start_time=run.start_time,
        end_time=run.end_time,
        lifecycle_stage=run.lifecycle_stage,
        artifact_uri=run.artifact_uri,
    )


def _write_params(session: Session, run_id: str, params: Sequence[Param]) -> None:
    if not params:
        return
    table = SqlParam.__table__
    query = select(table.c.key, table.c.value).where(table.c.run_uuid == run_id)
    known = {key: value for key, value in session.execute(query)}
    changed = [p.key for p in params if known.get(p.key, p.value) != p.value]
    if changed:
        raise MlflowException(
            f"run {run_id} has other values of the parameters {', '.join(changed)} already; "
            "MLflow's parameters cannot be changed",
            INVALID_PARAMETER_VALUE,
        )
    news = {param.key: param.value for param in params if param.key not in known}
    _write(session, table, _rows(run_id, news))


def _write_points(session: Session, points: Sequence[Row]) -> None:
    """The points, and the latest one of each metric, which MLflow keeps in a table of its own."""
    latest: dict[str, Row] = {}
    for point in points:
        other = latest.setdefault(point["key"], point)
        if [point[name] for name in _AGE] > [other[name] for name in _AGE]:
            latest[point["key"]] = point
    _write(session, SqlMetric.__table__, points)
    # In one order, so that two who write the same run never wait for each other.
    ordered = [latest[key] for key in sorted(latest)]
    _write(session, SqlLatestMetric.__table__, ordered, replace=(*_AGE, "is_nan"), later=_AGE)


def _rows(run_id: str, values: dict[str, str]) -> list[Row]:
    return [{"run_uuid": run_id, "key": key, "value": value} for key, value in values.items()]


def _write(
    session: Session,
    table: Table,
    rows: Collection[Row],
    *,
    replace: Iterable[str] = (),
    later: Sequence[str] = (),
) -> None:
    """Insert rows by one statement. Of those that are there already, the columns `replace` are
    replaced: in all of them, or where the new ones are greater by the columns `later`."""
    if not rows:
        return
    insert = _INSERTS[session.get_bind().dialect.name](table)
    columns = {name: insert.excluded[name] for name in replace}
    if not columns:
        insert = insert.on_conflict_do_nothing()
    else:
        newer = [insert.excluded[name] for name in later]
        older = [table.c[name] for name in later]
        insert = insert.on_conflict_do_update(
            index_elements=table.primary_key.columns,
            set_=columns,
            where=tuple_(*newer) > tuple_(*older) if later else None,
        )
    session.execute(insert, list(rows))
