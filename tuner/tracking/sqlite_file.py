"""MLflow's database in a file of its own, with all its tables or not at all.

MLflow makes some fifty tables and brings them up to date one migration after the other, in place.
Stopped in between, it leaves a file that it can neither finish nor read. So a new one is made under
another name.
"""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path
from typing import Any

PREFIX = "sqlite:///"
_migrating = threading.Lock()
"""Alembic's migrations keep their place in global variables."""


def sqlite_path(uri: str) -> Path | None:
    """The file that an address names; None for a server, another database, or none on a disk."""
    name = uri.removeprefix(PREFIX).split("?")[0]
    return Path(name) if uri.startswith(PREFIX) and name not in ("", ":memory:") else None


def make_whole(uri: str) -> None:
    """Make the database of a sqlite address if its file is not there; leave any other alone.
    Several processes may do so at once."""
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _migrating:
        if not path.exists():
            _make(path)


def _make(path: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        make: Any = SqlAlchemyStore
        store = make(f"{PREFIX}{draft}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # Another process was quicker.
        except OSError:  # A file system without links.
            if not path.exists():
                os.replace(draft, path)
    finally:
        for file in path.parent.glob(f"{draft.name}*"):
            file.unlink(missing_ok=True)
