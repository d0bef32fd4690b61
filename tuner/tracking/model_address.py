"""From what a person calls a model to a folder with it: addresses in MLflow, or a path.

Only clients with an explicit address are used, so MLflow's global address stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from core.errors import InputError

from ..addresses import canonical, check_tracking
from .artifacts import S3, check_bucket
from .sqlite_file import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/MODEL_ID, runs:/RUN_ID or a folder"
_SHOWN = 20
"""How many existing models an error lists."""


def find_model(model_uri: str, tracking_uri: str | None, download_to: Path) -> Path:
    """The folder of a model, fetched into `download_to` unless it is on this machine already.

    Raises InputError for an address of another form or a model that does not exist (with those
    that do), MlflowException when the server fails otherwise.
    """
    if not model_uri.startswith(("models:/", "runs:/")):
        return _local_folder(model_uri)
    import mlflow.artifacts

    tracking_uri = None if tracking_uri is None else canonical(tracking_uri)
    client = connect(tracking_uri)
    location = _locate(client, model_uri)
    path = urlparse(location).path if location.startswith("file:") else location
    if Path(path).is_dir():
        return Path(path)
    if location.startswith(S3):
        check_bucket(location)
    return Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=location, dst_path=str(download_to), tracking_uri=tracking_uri
        )
    )


def connect(tracking_uri: str | None) -> MlflowClient:
    """A client for reading. Raises InputError if no MLflow answers, and for a sqlite file that is
    not there, which MLflow would silently create."""
    from mlflow import MlflowClient

    if tracking_uri is not None:
        file = sqlite_path(tracking_uri)
        if file is not None and not file.is_file():
            raise InputError("there is no MLflow store", where=tracking_uri, hint="--tracking-uri")
        check_tracking(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri)


def _local_folder(model_uri: str) -> Path:
    folder = Path(model_uri)
    if (folder / "MLmodel").is_file() or (folder / "model.json").is_file():
        return folder
    problem = "no model in this folder" if folder.is_dir() else "no such folder"
    raise InputError(problem, where=model_uri, hint=f"valid: {FORMS}")


def _locate(client: MlflowClient, model_uri: str) -> str:
    """Where the model's files are stored."""
    from mlflow.exceptions import MlflowException

    scheme, _, rest = model_uri.partition(":/")
    name, at, alias = rest.strip("/").rpartition("@")
    try:
        if scheme == "runs":
            return _model_of_run(client, rest.strip("/"))
        if at:
            version = client.get_model_version_by_alias(name, alias).version
            return client.get_model_version_download_uri(name, version)
        name, slash, number = rest.strip("/").rpartition("/")
        if slash and number.isdigit():
            return client.get_model_version_download_uri(name, number)
        if not slash and number.startswith("m-"):
            return str(client.get_logged_model(number).artifact_location)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        hint = f"there are: {_existing(client)}"
        raise InputError("no such model", where=model_uri, hint=hint) from error
    raise InputError(
        "not the address of a model",
        where=model_uri,
        hint=f"valid: {FORMS}; there are: {_existing(client)}",
    )


def _model_of_run(client: MlflowClient, rest: str) -> str:
    """The newest logged model of `RUN_ID` or of `RUN_ID/NAME`."""
    run_id, _, name = rest.partition("/")
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(o.model_id) for o in outputs.model_outputs] if outputs else []
    models = [m for m in models if m.status == "READY" and name in ("", m.name)]
    if not models:
        raise InputError(f"the run has no logged model {name}".rstrip(), where=f"runs:/{rest}")
    return str(max(models, key=lambda m: m.creation_timestamp).artifact_location)


def _existing(client: MlflowClient) -> str:
    """The registered models with their aliases, or their newest version without any."""
    shown = []
    for model in client.search_registered_models(max_results=_SHOWN):
        aliases = [f"models:/{model.name}@{alias}" for alias in model.aliases]
        versions = [f"models:/{model.name}/{v.version}" for v in model.latest_versions]
        shown += aliases or versions or [f"{model.name} (no version)"]
    return ", ".join(shown) or "none"
