"""What `BulkStore` writes are the rows that MLflow's own store writes for the same calls."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import (
    SqlLatestMetric,
    SqlMetric,
    SqlParam,
    SqlRun,
    SqlTag,
)
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.tracking.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore
from sqlalchemy import select

from tuner.tracking.bulk_store import BulkStore
from tuner.tracking.mlflow_plugin import bulk_address, open_bulk_store
from tuner.tracking.mlflow_store import open_client

TABLES = (SqlMetric, SqlLatestMetric, SqlParam, SqlTag)
OF_ONE_RUN = ("run_uuid", "artifact_uri", "start_time")
"""Columns of `runs` that differ between two that are made alike."""
NAN, INFINITY = float("nan"), float("inf")
CURVE = [
    Metric(key, value / 10, 1000 + step, step)
    for key in ("loss", "accuracy") for step, value in enumerate((3, 1, 4, 1, 5), 1)
]  # fmt: skip

Batch = tuple[list[Metric], list[Param], list[RunTag]]


def one_by_one(*points: tuple[float, int, int]) -> list[Batch]:
    """A batch each, of a loss: value, time, step."""
    return [([Metric("loss", *point)], [], []) for point in points]


SEQUENCES: dict[str, list[Batch]] = {
    "a trial": [
        ([*CURVE, Metric("best", 0.5, 7, 0)], [Param("lr", "0.1")], [RunTag("status", "complete")])
    ],
    "nothing": [([], [], [])],
    "a whole number": [([Metric("loss", 1, 5, 1)], [], [])],
    "not finite": [
        ([Metric("loss", v, 9, s) for s, v in enumerate((1.0, NAN, INFINITY, -INFINITY))], [], [])
    ],
    "NaN last": one_by_one((1.0, 9, 1), (NAN, 9, 2)),
    "NaN beside zero": [([Metric("loss", NAN, 9, 1), Metric("loss", 0.0, 9, 1)], [], [])],
    "a point twice in a batch": [([Metric("loss", 1.0, 9, 1)] * 2, [], [])],
    "a batch twice": [(CURVE, [Param("lr", "0.1")], [RunTag("status", "complete")])] * 2,
    "a batch that was half there": [
        (CURVE[:3], [Param("lr", "0.1")], []),
        (CURVE, [Param("lr", "0.1"), Param("epochs", "30")], [RunTag("status", "complete")]),
    ],
    "an earlier step later": one_by_one((1.0, 9, 5), (2.0, 10, 4)),
    "a later time": one_by_one((2.0, 9, 5), (1.0, 10, 5)),
    "a greater value": one_by_one((1.0, 9, 5), (2.0, 9, 5)),
    "a smaller value": one_by_one((2.0, 9, 5), (1.0, 9, 5)),
    "a tag replaced": [([], [], [RunTag("note", "a")]), ([], [], [RunTag("note", "b")])],
    "a tag twice in a batch": [([], [], [RunTag("note", "a"), RunTag("note", "b")])],
    "the run's name": [([], [], [RunTag("mlflow.runName", "another")])],
    "texts": [([], [Param("p: a/b", "ü;'--\"")], [RunTag("mlflow.note.content", "x" * 9000)])],
}  # fmt: skip

REFUSED: dict[str, Batch] = {
    "a parameter changed": ([], [Param("lr", "0.2")], []),
    "a parameter twice": ([], [Param("x", "1"), Param("x", "2")], []),
    "a metric's name": ([Metric("a" * 300, 1.0, 1, 1)], [], []),
    "a metric's sign": ([Metric("a?b", 1.0, 1, 1)], [], []),
    "a metric's value": ([Metric("loss", "x", 1, 1)], [], []),
    "a metric's time": ([Metric("loss", 1.0, -1, 1)], [], []),
    "a metric's step": ([Metric("loss", 1.0, 1, "first")], [], []),
    "a tag's name": ([], [], [RunTag("", "x")]),
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres").url
        return url
    return f"sqlite:///{tmp_path_factory.mktemp('bulk')}/mlflow.db"


@pytest.fixture(scope="module")
def clients(database: str) -> dict[str, MlflowClient]:
    """Ours and MLflow's own, on one database."""
    ours = open_client(database)
    ours.search_experiments()  # Makes the tables, before the other looks for them.
    return {"ours": ours, "mlflow's": MlflowClient(database)}


def rows_of(client: MlflowClient, run_id: str) -> dict[str, list[tuple[Any, ...]]]:
    """A run's rows in all tables, without its id."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    store = client._tracking_client.store
    with store.ManagedSessionMaker() as session:
        for model in TABLES:
            table = model.__table__
            columns = [column for column in table.columns if column.name != "run_uuid"]
            found = session.execute(select(*columns).where(table.c.run_uuid == run_id))
            rows[table.name] = sorted(tuple(row) for row in found)
        columns = [column for column in SqlRun.__table__.columns if column.name not in OF_ONE_RUN]
        found = session.execute(select(*columns).where(SqlRun.run_uuid == run_id))
        rows["runs"] = [tuple(row) for row in found]
    return rows


def test_the_clients_write_through_the_stores_that_are_compared(
    clients: dict[str, MlflowClient],
) -> None:
    assert type(clients["ours"]._tracking_client.store) is BulkStore
    assert type(clients["mlflow's"]._tracking_client.store) is SqlAlchemyStore


@pytest.mark.parametrize("batches", SEQUENCES.values(), ids=list(SEQUENCES))
def test_rows_are_mlflows_own(clients: dict[str, MlflowClient], batches: list[Batch]) -> None:
    written = {}
    for name, client in clients.items():
        run = client.create_run("0", run_name="the same", tags={"tuner.trial": "1"})
        for metrics, params, tags in batches:
            client.log_batch(run.info.run_id, metrics, params, tags)
        written[name] = rows_of(client, run.info.run_id)
    assert written["ours"] == written["mlflow's"]


@pytest.mark.parametrize("batch", REFUSED.values(), ids=list(REFUSED))
def test_what_mlflow_refuses_is_refused_and_leaves_nothing(
    clients: dict[str, MlflowClient], batch: Batch
) -> None:
    codes = []
    for client in clients.values():
        run_id = client.create_run("0").info.run_id
        client.log_batch(run_id, params=[Param("lr", "0.1")])
        before = rows_of(client, run_id)
        metrics, params, tags = batch
        with pytest.raises(MlflowException) as caught:
            client.log_batch(run_id, [*metrics, *CURVE], params, [RunTag("fine", "x"), *tags])
        codes.append(caught.value.error_code)
        if client is clients["ours"]:
            assert rows_of(client, run_id) == before
    assert codes[0] == codes[1]


def test_runs_that_are_not_there_or_deleted_are_refused(clients: dict[str, MlflowClient]) -> None:
    for client in clients.values():
        deleted = client.create_run("0").info.run_id
        client.delete_run(deleted)
        for run_id, code in ((deleted, "INVALID_PARAMETER_VALUE"),
                             ("0" * 32, "RESOURCE_DOES_NOT_EXIST")):  # fmt: skip
            with pytest.raises(MlflowException) as caught:
                client.log_batch(run_id, CURVE)
            assert caught.value.error_code == code
        assert not rows_of(client, deleted)["metrics"]


@pytest.mark.parametrize(
    "options",
    [
        {"run_name": "a trial", "tags": {"tuner.trial": "1", "mlflow.user": "someone"}},
        {"run_name": "a trial"},
        {"tags": {"mlflow.runName": "named by a tag"}},
    ],
    ids=["as a trial's", "without tags", "named by a tag"],
)
def test_a_run_is_made_and_ended_as_mlflow_does(
    clients: dict[str, MlflowClient], options: dict[str, Any]
) -> None:
    rows, seen = [], []
    for client in clients.values():
        run = client.create_run("0", start_time=1000, **options)
        kept = client.get_run(run.info.run_id)
        assert (dict(kept.info), kept.data.tags) == (dict(run.info), run.data.tags)
        assert run.info.artifact_uri.endswith(f"/0/{run.info.run_id}/artifacts")
        client.log_batch(run.info.run_id, CURVE)
        client.set_terminated(run.info.run_id, "FAILED", end_time=2000)
        rows.append(rows_of(client, run.info.run_id))
        ended = client.get_run(run.info.run_id)
        info = {**dict(ended.info), "run_id": "", "artifact_uri": ""}
        seen.append((info, ended.data.to_dictionary()))
    assert rows[0] == rows[1]
    assert seen[0] == seen[1]
    assert seen[0][0]["status"] == "FAILED" and seen[0][0]["end_time"] == 2000


def test_a_run_is_renamed_as_mlflow_does(clients: dict[str, MlflowClient]) -> None:
    rows = []
    for client in clients.values():
        run_id = client.create_run("0", run_name="old").info.run_id
        client.update_run(run_id, status="KILLED", name="new")
        rows.append(rows_of(client, run_id))
    assert rows[0] == rows[1]


def test_no_run_is_made_in_an_experiment_that_is_not_there_or_deleted(
    clients: dict[str, MlflowClient],
) -> None:
    for name, client in clients.items():
        deleted = client.create_experiment(f"of {name}")
        client.delete_experiment(deleted)
        for experiment, code in ((deleted, "INVALID_PARAMETER_VALUE"),
                                 ("987654", "RESOURCE_DOES_NOT_EXIST")):  # fmt: skip
            with pytest.raises(MlflowException) as caught:
                client.create_run(experiment, run_name="a trial")
            assert caught.value.error_code == code


def test_a_deleted_run_is_not_ended(clients: dict[str, MlflowClient]) -> None:
    for client in clients.values():
        run_id = client.create_run("0", run_name="a trial").info.run_id
        client.delete_run(run_id)
        with pytest.raises(MlflowException) as caught:
            client.set_terminated(run_id, "FINISHED")
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
        assert client.get_run(run_id).info.status == "RUNNING"


def test_two_who_write_one_run_at_once_lose_nothing(clients: dict[str, MlflowClient]) -> None:
    """As a driver does whose trial another one took over."""
    run_id = clients["ours"].create_run("0").info.run_id
    halves = CURVE[::2] + CURVE[:1], CURVE[1::2] + CURVE[:1]
    errors: list[Exception] = []

    def write(metrics: list[Metric]) -> None:
        try:
            for _ in range(10):
                clients["ours"].log_batch(run_id, metrics, tags=[RunTag("note", "x")])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    rows = rows_of(clients["ours"], run_id)
    assert len(rows["metrics"]) == len(CURVE)
    assert {row[:2] for row in rows["latest_metrics"]} == {("loss", 0.5), ("accuracy", 0.5)}


def test_another_mlflow_than_the_tested_one_writes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.version.VERSION", "3.99.0")
    assert type(open_bulk_store(f"tuner:sqlite:///{tmp_path}/mlflow.db")) is SqlAlchemyStore


def test_workspaces_are_mlflows_own_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    store = open_bulk_store(f"tuner:sqlite:///{tmp_path}/mlflow.db")
    assert type(store) is WorkspaceAwareSqlAlchemyStore


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "mysql://host/db", "mlruns"])
def test_other_stores_keep_their_address(uri: str) -> None:
    assert bulk_address(uri) == uri


def test_importing_mlflow_loads_no_more_of_ours_than_its_entry_point(tmp_path: Path) -> None:
    """MLflow loads entry points of all that is installed, for everybody who imports it."""
    program = (
        "import sys, mlflow.tracking\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('tuner', 'core', 'ray')))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100,
        check=True,
    ).stdout  # fmt: skip
    assert output.strip() == "['tuner', 'tuner.tracking', 'tuner.tracking.mlflow_plugin']"
