"""MLflow's entry point to our store: addresses such as `tuner:sqlite:///mlflow.db`.

Of the group `mlflow.tracking_store` in pyproject.toml. MLflow loads this file whenever it is
imported, so it imports nothing.
"""

from __future__ import annotations

from typing import Any

SCHEME = "tuner:"
_DATABASES = ("sqlite:", "postgresql:", "postgresql+")


def bulk_address(uri: str) -> str:
    """The address under which MLflow opens a database by our store; any other stays as it is."""
    return f"{SCHEME}{uri}" if uri.startswith(_DATABASES) else uri


def open_bulk_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """The store of such an address, for MLflow's registry of stores."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH

    from .bulk_store import BulkStore

    return BulkStore(
        store_uri.removeprefix(SCHEME), artifact_uri or DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    )
