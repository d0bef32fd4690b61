"""Where Optuna keeps a study: a journal file in the study's folder, or a database.

A database may go away and come back while a study runs (`SurvivingStorage`); that it is not there
at the start is a mistake in what was handed in, and said at once.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError

from ..addresses import canonical, first_line, read_database, without_password
from .outage import LIMIT_SECONDS, Outage, OutageWatcher

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage
    from sqlalchemy import Connection

JOURNAL = "journal.log"
WAIT_VARIABLE = "TUNER_STORAGE_MINUTES"
LIBPQ_DRIVERS = ("psycopg2", "psycopg")
LIBPQ_OPTIONS: dict[str, Any] = {
    "connect_timeout": 5,  # Seconds, of each address of the host.
    # A machine that lost its power says nothing: a connection to it ends after some 30 s.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # Milliseconds.
}


def open_storage(url: str | None, folder: Path, *, limit: float | None = None) -> BaseStorage:
    """Optuna's storage: a journal file in `folder`, or the database at `url`.

    `limit`: for how many seconds calls wait for a database that has gone away since; None for
    TUNER_STORAGE_MINUTES, or ten minutes. Raises InputError if it does not answer now.
    """
    from optuna.storages import JournalStorage

    from .journal_file import JournalFile
    from .surviving_storage import SurvivingStorage

    if url is None:
        return JournalStorage(JournalFile(folder / JOURNAL))
    # Optuna logs what it then raises.
    logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
    outage = Outage(
        where=f"--storage {without_password(url)}",
        hint=f"its trials are kept; once the storage is back: tuner resume {folder.name}",
        limit=_limit() if limit is None else limit,
    )
    return SurvivingStorage(_open_database(url), outage)


def stored_studies(storage: str | None) -> set[str]:
    """Names of the studies in an Optuna database; none in a study's own journal.

    Raises InputError if the database does not answer.
    """
    if storage is None:
        return set()

    def read(connection: Connection) -> set[str]:
        from sqlalchemy import inspect, text

        if not inspect(connection).has_table("studies"):
            return set()
        return {str(row[0]) for row in connection.execute(text("SELECT study_name FROM studies"))}

    return read_database(storage, read, flag="--storage", nothing=set())


def watch_outages(storage: BaseStorage, watcher: OutageWatcher) -> None:
    """Tell `watcher` when the database is away. (A journal never is.)"""
    from .surviving_storage import SurvivingStorage

    if isinstance(storage, SurvivingStorage):
        storage.outage.watcher = watcher


def engine_options(url: str) -> dict[str, Any]:
    """How SQLAlchemy is to connect: arguments of `create_engine`."""
    from sqlalchemy.engine import make_url

    parts = make_url(url)
    options: dict[str, Any] = {}
    if parts.get_backend_name() != "sqlite":
        options["pool_pre_ping"] = True  # A connection that broke while idle is replaced.
    if parts.get_driver_name() in LIBPQ_DRIVERS:
        options["connect_args"] = {k: v for k, v in LIBPQ_OPTIONS.items() if k not in parts.query}
    return options


def _limit() -> float:
    """Seconds. Raises InputError if TUNER_STORAGE_MINUTES is no number of minutes."""
    given = os.environ.get(WAIT_VARIABLE)
    if not given:
        return LIMIT_SECONDS
    try:
        minutes = float(given)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise InputError(f"expected minutes, 0 or more, but got {given!r}", where=WAIT_VARIABLE)
    return 60 * minutes


def _open_database(url: str) -> RDBStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    url = canonical(url)
    try:
        # Optuna fills in a template; a literal brace of a password is not one.
        template = url.replace("{", "{{").replace("}", "}}")
        try:
            return RDBStorage(template, engine_kwargs=engine_options(url))
        except (IntegrityError, ProgrammingError):
            # Another process made the tables in the same moment: now they are there.
            return RDBStorage(template, engine_kwargs=engine_options(url))
    except Exception as error:  # SQLAlchemy's dialects raise errors of their own.
        raise InputError(
            f"the storage cannot be opened ({first_line(error)})",
            where=f"--storage {without_password(url)}",
            hint="a SQLAlchemy URL: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE",
        ) from error
