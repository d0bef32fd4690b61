"""MLflow's entry point to our store: addresses such as `tuner:sqlite:///mlflow.db`.

Of the group `mlflow.tracking_store` in pyproject.toml. MLflow loads this file whenever it is
imported, so it imports nothing.
"""

from __future__ import annotations

from typing import Any

SCHEME = "tuner:"
KNOWN_MLFLOW = "3.17"
"""Whose tables our store writes: tests/contracts/test_bulk_store.py."""
_DATABASES = ("sqlite:", "postgresql:", "postgresql+")


def bulk_address(uri: str) -> str:
    """The address under which MLflow opens a database by our store; any other stays as it is."""
    return f"{SCHEME}{uri}" if uri.startswith(_DATABASES) else uri


def open_bulk_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """The store of such an address, for MLflow's registry of stores: MLflow's own, which writes the
    same and takes longer, with another MLflow than ours is tested with, or with workspaces."""
    from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store
    from mlflow.version import VERSION

    address = store_uri.removeprefix(SCHEME)
    if not VERSION.startswith(f"{KNOWN_MLFLOW}.") or MLFLOW_ENABLE_WORKSPACES.get():
        return _get_sqlalchemy_store(address, artifact_uri)
    from .bulk_store import BulkStore

    return BulkStore(address, artifact_uri or DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
