"""What is asked of an MLflow store: which studies it has, and whether an error may pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from core.errors import InputError
from tuner.tracking.mlflow_store import (
    find_experiment,
    may_pass,
    reason,
    tracked_studies,
)

from .tracked import tracker_of


def test_names_of_studies_are_found_without_making_a_store(
    tracking_server: str, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "mlflow.db"
    assert tracked_studies(f"sqlite:///{file}", "posters") == set()
    assert find_experiment(f"sqlite:///{file}", "posters") is None
    assert not file.exists()
    tracker = tracker_of(tracking_server, name)
    tracker.start_study({})
    tracker.flush()
    tracker.close()
    assert name in tracked_studies(tracking_server, "posters")
    assert tracked_studies(tracking_server, "no such experiment") == set()


def test_what_may_pass_is_told_from_what_is_wrong(tracking_server: str) -> None:
    client = MlflowClient(tracking_server)
    run = client.create_run("0")
    with pytest.raises(MlflowException) as caught:
        client.log_batch(run.info.run_id, metrics=[Metric("a" * 300, 1.0, 1, 1)])
    assert not may_pass(caught.value)
    with pytest.raises(MlflowException) as caught:
        client.get_run("nobody")
    assert not may_pass(caught.value)
    with pytest.raises(MlflowException) as caught:
        MlflowClient("http://127.0.0.1:1").get_run("nobody")
    assert may_pass(caught.value) and reason(caught.value) == "Connection refused"
    full = OSError(28, "No space left on device")
    assert may_pass(full) and reason(full) == "No space left on device"
    assert not may_pass(InputError("x", where="y"))
    assert not may_pass(TypeError())


def test_a_database_that_was_restarted_may_pass() -> None:
    from sqlalchemy.exc import DBAPIError

    broken = MlflowException("gone", error_code=BAD_REQUEST)  # As MLflow says of any such error.
    broken.__cause__ = DBAPIError("SELECT 1", {}, Exception(), connection_invalidated=True)
    assert broken.error_code == "BAD_REQUEST"
    assert may_pass(broken)
    broken.__cause__ = DBAPIError("SELECT 1", {}, Exception())
    assert not may_pass(broken)
