"""The lock between the drivers of a study: under it trials are asked for, taken over and ended.

PostgreSQL's advisory lock where the study is in PostgreSQL; else a lock on a file that all its
drivers see. The system, or the server, lets go of the lock of a process that died. A process that
is frozen with PostgreSQL's lock loses it after IDLE_SECONDS: so whoever holds it long asks, before
each step, whether it still does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import InputError

from ..addresses import canonical, without_password
from ..studies.storage import engine_options

if TYPE_CHECKING:
    from sqlalchemy import Connection

IDLE_SECONDS = 60
"""After so long without a word from its holder, PostgreSQL gives the lock to another."""
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.1
"""Seconds between two tries. Polling, as a wait inside a database driver hears no Ctrl-C."""

Kept = Callable[[], bool]
"""Whether the lock is still ours."""


class DriverLock(Protocol):
    """Held by one driver of a study at a time. It is not reentrant."""

    def hold(self) -> AbstractContextManager[Kept]: ...


class FileLock:
    """A lock on a file, which the system ends with its process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def hold(self) -> Iterator[Kept]:
        with self._path.open("a") as file:
            for _ in _tries():
                if locked(file):
                    break
            yield lambda: True


class PostgresLock:
    """An advisory lock of a transaction, in a session of its own.

    Args:
        url: of the database, with its password.
        name: of what is locked.
        wait: called when the server cannot be reached; returns when it can, or raises.
    """

    def __init__(self, url: str, name: str, *, wait: Callable[[], None]) -> None:
        from sqlalchemy import create_engine

        url = canonical(url)
        self._engine = create_engine(url, pool_size=1, **engine_options(url))
        digest = hashlib.sha256(f"poster-tuner {name}".encode()).digest()
        self._key = int.from_bytes(digest[:8], signed=True)
        self._wait = wait

    @contextmanager
    def hold(self) -> Iterator[Kept]:
        connection = self._acquire()
        try:
            yield lambda: _answers(connection)
        finally:
            _give_back(connection)

    def _acquire(self) -> Connection:
        from sqlalchemy.exc import DBAPIError

        for _ in _tries():
            connection = None
            try:
                connection = self._engine.connect()
                if self._try(connection):
                    return connection
            except DBAPIError:
                self._wait()
            if connection is not None:
                _give_back(connection)
        raise AssertionError("tries never end")

    def _try(self, connection: Connection) -> bool:
        from sqlalchemy import text

        # In one question. A machine that lost its power says nothing: the server has to ask it.
        question = text(
            "SELECT pg_try_advisory_xact_lock(:key),"
            " set_config('idle_in_transaction_session_timeout', :idle, true),"
            " set_config('tcp_keepalives_idle', '10', true),"
            " set_config('tcp_keepalives_interval', '5', true),"
            " set_config('tcp_keepalives_count', '3', true)"
        )
        found = connection.execute(question, {"key": self._key, "idle": f"{IDLE_SECONDS}s"})
        return bool(found.one()[0])


def driver_lock(
    url: str | None, folder: Path, name: str, *, wait: Callable[[], None]
) -> DriverLock:
    """The lock of the study `name`, kept in the database at `url`, or in `folder` (None).

    Other databases than PostgreSQL and SQLite have none that all drivers see: that of the folder
    is among the drivers of one home. `wait`: see `PostgresLock`.
    """
    if url is not None:
        from sqlalchemy.engine import make_url

        parts = make_url(url)
        if parts.get_backend_name() == "postgresql":
            return PostgresLock(url, name, wait=wait)
        if parts.get_backend_name() == "sqlite":
            return FileLock(Path(f"{parts.database}.{name}.lock"))
    return FileLock(folder / ".asking")


def check_shared(url: str) -> None:
    """Raises InputError if drivers of several homes have no lock in the database at `url`."""
    from sqlalchemy.engine import make_url

    if make_url(url).get_backend_name() not in ("postgresql", "sqlite"):
        raise InputError(
            "several drivers are kept apart in PostgreSQL and SQLite only",
            where=f"--storage {without_password(url)}",
        )


def locked(file: Any, *, shared: bool = False) -> bool:
    """Lock an open file, if nobody has it locked; the lock ends when it is closed. `shared`: of
    several that only ask at once, each is told that nobody has it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tries() -> Iterator[None]:
    """Endless, at once and then with pauses that grow."""
    pause = FIRST_PAUSE
    while True:
        yield
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _answers(connection: Connection) -> bool:
    """Whether the session that holds the lock is still there."""
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    try:
        connection.execute(text("SELECT 1"))
    except DBAPIError:
        return False
    return True


def _give_back(connection: Connection) -> None:
    """End the transaction, and its lock with it. A session that is gone has none."""
    from sqlalchemy.exc import DBAPIError

    with contextlib.suppress(DBAPIError):
        connection.rollback()
    connection.close()
