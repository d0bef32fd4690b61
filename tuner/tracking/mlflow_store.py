"""MLflow's side of a study: experiments, runs found by their tags, and what may be tried again.

Every call here may be done twice. MLflow's own retries are off: they would send a call whose answer
was lost again as it is, and make a second run of it; ours look first.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from core.errors import InputError

from ..addresses import first_line, without_password
from .mlflow_plugin import bulk_address
from .sqlite_file import make_whole, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

STUDY = "tuner.study"
TRIAL = "tuner.trial"
MAX_TEXT = 5000
"""MLflow refuses longer tags."""
MAX_REASON = 100
_REFUSALS = frozenset(
    {
        "BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED",
        "RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED",
    }
)  # fmt: skip
"""MLflow says that the request itself is wrong."""
_MISTAKES = (
    InputError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    NameError, TypeError,
)  # fmt: skip
"""Never MLflow's absence."""

Points = Sequence[tuple[Mapping[str, float], int]]
"""Metrics with their step."""


def quiet_mlflow() -> None:
    """MLflow's own messages off the screen; its warnings stay. (It sets its level on import.)"""
    import mlflow  # noqa: F401

    # With a server it would print two lines a run, and ask the server for each of them.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The traceback of every error of its database; we say ourselves what is wrong.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def open_client(tracking_uri: str) -> MlflowClient:
    """A client with an address of its own: MLflow's global one stays as it is."""
    from mlflow import MlflowClient

    make_whole(tracking_uri)
    return MlflowClient(tracking_uri=bulk_address(tracking_uri), registry_uri=tracking_uri)


def tracked_studies(uri: str, experiment: str) -> set[str]:
    """Names of the studies that an experiment holds. The address has been checked."""
    found = find_experiment(uri, experiment)
    if found is None:
        return set()
    parents = search_runs(open_client(uri), found.experiment_id, f"tags.`{TRIAL}` = 'study'")
    return {run.data.tags[STUDY] for run in parents}


def find_experiment(uri: str, name: str) -> Any:
    """MLflow's experiment, or None. The address has been checked."""
    file = sqlite_path(uri)
    if file is not None and not file.exists():
        return None  # MLflow would make it.
    quiet_mlflow()
    return open_client(uri).get_experiment_by_name(name)


def open_experiment(client: MlflowClient, name: str, location: str | None) -> Any:
    """MLflow's experiment; made if it is not there, with its artifacts at `location`."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(client.create_experiment(name, location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # Another study was quicker.
            assert found is not None
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return found


def artifact_location(artifacts: Path | str, tracking_uri: str, experiment: str) -> str | None:
    """Where a new experiment keeps its artifacts; None where the server decides.

    `artifacts` is a URL that a person asked for, or the home's folder, which is for stores without
    a server.
    """
    if isinstance(artifacts, str):
        return f"{artifacts.rstrip('/')}/{quote(experiment)}"
    is_server = tracking_uri.startswith(("http://", "https://"))
    return None if is_server else (artifacts / experiment).as_uri()


def search_runs(client: MlflowClient, experiment_id: str, query: str) -> list[Any]:
    """All runs that a query finds."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def log_to_run(
    client: MlflowClient,
    run_id: str,
    *,
    points: Points = (),
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    milliseconds: int | None = None,
) -> None:
    """Metrics, parameters and tags in as few calls as MLflow allows.

    `milliseconds`: the time of the metrics. A point that is there with the same time stays one.
    """
    from mlflow.entities import Metric, Param, RunTag

    now = milliseconds or int(time.time() * 1000)
    metrics = [
        Metric(key, float(value), now, step)
        for values, step in points
        for key, value in values.items()
    ]
    entries = [Param(key, _text(value)) for key, value in (params or {}).items()]
    labels = [RunTag(key, _text(value)) for key, value in (tags or {}).items()]
    # MLflow takes at most 1,000 metrics (and 1,000 things in all) in one call.
    head, rest = metrics[:800], metrics[800:]
    client.log_batch(run_id, metrics=head, params=entries[:99], tags=labels[:99])
    for start in range(0, len(rest), 1000):
        client.log_batch(run_id, metrics=rest[start : start + 1000])


def may_pass(error: Exception) -> bool:
    """Whether trying again can help: not where MLflow says that the request itself is wrong."""
    from sqlalchemy.exc import DBAPIError, InterfaceError

    cause = error.__cause__
    if isinstance(cause, InterfaceError) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    ):
        return True  # A database that was restarted, which MLflow calls a bad request.
    if isinstance(error, _MISTAKES):
        return False
    return getattr(error, "error_code", "") not in _REFUSALS


def reason(error: BaseException) -> str:
    """Why MLflow could not be written, in a few words: the system's own, where it has any."""
    root: BaseException = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    if isinstance(root, OSError) and root.strerror:
        return root.strerror
    text = without_password(first_line(error))
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def _text(value: Any) -> str:
    return str(value)[:MAX_TEXT]
