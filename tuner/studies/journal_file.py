"""The journal of a study: Optuna's operations, a JSON line each, in a file of the study's folder.

Optuna's own file backend leaves half a line behind where the disk is full, which spoils the file
once more is written, and a lock file where its process is killed. Here a line is written whole or
not at all, and the lock is the system's, which ends with its process.

A trial has some twenty parameters, and to wait for the disk after each takes longer than to propose
them. They wait for the next line of another kind instead: should the machine lose its power before,
the trial is proposed the same parameters again (`tuner.sampling.reproducible`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from .appending import append_whole

PARAMETER = 5
"""Optuna's code of the operation that sets a parameter of a trial."""


class JournalFile(BaseJournalBackend):
    """Optuna's journal in the file `path`, made if it is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = JournalFileBackend(str(path))

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All of them; on the disk, but for mere parameters. Raises InputError, and nothing is
        written, if that fails."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        waits = any(log["op_code"] != PARAMETER for log in logs)
        append_whole(self._path, text.encode(), waits=waits)
