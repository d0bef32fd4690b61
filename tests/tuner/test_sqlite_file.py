"""MLflow's own database file is whole or not there, also when whoever makes it is stopped."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tuner.tracking import sqlite_file
from tuner.tracking.mlflow_store import open_client, quiet_mlflow
from tuner.tracking.sqlite_file import make_whole, sqlite_path


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    quiet_mlflow()


def _check_whole(file: Path) -> None:
    client = MlflowClient(f"sqlite:///{file}", registry_uri=f"sqlite:///{file}")
    run = client.create_run(client.create_experiment("posters"))
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    client.create_registered_model("best")
    assert os.listdir(file.parent) == [file.name]


def test_one_who_is_stopped_between_the_tables_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "home" / "mlflow.db"
    with monkeypatch.context() as patch:

        def stopped(engine: object) -> None:
            assert [name for name in os.listdir(file.parent) if name.startswith(".mlflow.db.")]
            raise KeyboardInterrupt

        patch.setattr("mlflow.store.db.utils._upgrade_db", stopped)
        with pytest.raises(KeyboardInterrupt):
            open_client(f"sqlite:///{file}")
    assert os.listdir(file.parent) == []
    open_client(f"sqlite:///{file}")
    _check_whole(file)


@pytest.mark.parametrize("has_links", [True, False])
def test_several_at_once_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(sqlite_file.os, "link", refuse)
    file = tmp_path / "mlflow.db"
    errors: list[BaseException] = []

    def make() -> None:
        try:
            make_whole(f"sqlite:///{file}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    _check_whole(file)


def test_one_that_is_there_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"somebody's")
    make_whole(f"sqlite:///{file}")
    assert file.read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////data/mlflow.db", "/data/mlflow.db"),
        ("sqlite:///mlflow.db?timeout=5", "mlflow.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://127.0.0.1:5000", None),
        ("postgresql://me@db/mlflow", None),
    ],
)
def test_only_files_have_a_path(uri: str, path: str | None) -> None:
    assert sqlite_path(uri) == (None if path is None else Path(path))
