"""Where things live unless told otherwise: one folder, `~/.poster-tuner` or TUNER_HOME.

studies/NAME/      a study: study.json, split.json, journal.log (Optuna), models, Tune's state
cache/             decoded pictures and features, content-addressed, shared by all studies
mlflow.db          MLflow's runs and registry, where no --tracking-uri is given
artifacts/         MLflow's artifacts
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError

HOME_VARIABLE = "TUNER_HOME"
LIMIT_VARIABLE = "TUNER_CACHE_GB"
MEMORY_VARIABLE = "TUNER_MEMORY_GB"


@dataclass(frozen=True, kw_only=True)
class Home:
    """The folder of this installation's studies, and the places in it."""

    root: Path

    @property
    def studies(self) -> Path:
        return self.root / "studies"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def cache_limit(self) -> int | None:
        """Bytes that the cache may take, from TUNER_CACHE_GB; None for no limit.

        Raises InputError if that is no number of gigabytes.
        """
        return _gigabytes(LIMIT_VARIABLE)

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a fine-tuning worker may take, from TUNER_MEMORY_GB; None for what its device
        has free. Raises InputError if that is no number of gigabytes."""
        return _gigabytes(MEMORY_VARIABLE)

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def tracking_uri(self) -> str:
        """MLflow's sqlite store in this folder, unless MLFLOW_TRACKING_URI names another."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"


def open_home(root: Path | None = None) -> Home:
    """The home in `root`, or TUNER_HOME, or `~/.poster-tuner`, made if it is not there.

    Raises InputError if it cannot be written, or a limit makes no sense.
    """
    chosen = root or Path(os.environ.get(HOME_VARIABLE) or "~/.poster-tuner")
    home = Home(root=chosen.expanduser().resolve())
    _ = home.cache_limit, home.memory_limit
    try:
        home.studies.mkdir(parents=True, exist_ok=True)
        home.cache.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})",
            where=str(home.root),
            hint=f"name another folder with {HOME_VARIABLE}",
        ) from error
    if not os.access(home.studies, os.W_OK):
        raise InputError(
            "cannot be written (permission denied)",
            where=str(home.root),
            hint=f"name another folder with {HOME_VARIABLE}",
        )
    return home


def _gigabytes(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise InputError(f"expected gigabytes, 0 or more, but got {text!r}", where=variable)
    return int(limit * 10**9)
