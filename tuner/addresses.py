"""Whether anything answers at an address, asked before anything is started.

Drivers and clients of their own wait for minutes, or for ever where a port accepts and then says
nothing; here every question ends after ANSWER_SECONDS. Nothing is written: a SQLite file that is
not there yet is not made.
"""

from __future__ import annotations

import http.client
import os
import queue
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from core.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Connection

Found = TypeVar("Found")

ANSWER_SECONDS = 8
"""With the time that it takes to start, a person hears within 15 s."""
SOCKET_SECONDS = 2 * ANSWER_SECONDS
"""A socket's own limit, for the thread left behind; longer, so that one message is given."""
MEMORY = ":memory:"
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""RFC 9113: the preface and an empty SETTINGS frame; a server's first frame is SETTINGS, too."""
_SETTINGS = 4


def check_tracking(uri: str) -> None:
    """Raises InputError if there is no MLflow at the address."""
    _refuse_open_password(uri, "--tracking-uri")
    if uri.startswith(("http://", "https://")):
        try:
            _within(ANSWER_SECONDS, lambda: _ask_health(uri))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InputError(
                f"no MLflow server answers ({getattr(error, 'reason', None) or error})",
                where=f"--tracking-uri {without_password(uri)}",
                hint="start one (mlflow server), or leave the flag out for a local store",
            ) from error
    elif "://" in uri:
        read_database(uri, lambda _: None, flag="--tracking-uri", nothing=None)
    else:
        raise InputError(
            "this is no address of MLflow",
            where=f"--tracking-uri {uri}",
            hint="http://HOST:PORT, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE",
        )


def read_database(
    url: str, read: Callable[[Connection], Found], *, flag: str, nothing: Found
) -> Found:
    """What `read` finds in a database; `nothing` for a SQLite file that is not there yet.

    Raises InputError, with `flag` as its place, if there is no database at the URL.
    """
    where = f"{flag} {without_password(url)}"
    _refuse_open_password(url, flag)
    try:
        from sqlalchemy import create_engine, inspect
        from sqlalchemy.engine import make_url

        parts = make_url(canonical(url))
        if parts.get_backend_name() == "sqlite" and not _sqlite_file(parts.database, where):
            return nothing
        engine = create_engine(parts)

        def ask() -> Found:
            with engine.connect() as connection:
                inspect(connection).get_table_names()  # SQLite opens a file when it is read.
                return read(connection)

        return _within(ANSWER_SECONDS, ask)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"there is no driver for this database ({first_line(error)})",
            where=where,
            hint="for PostgreSQL: pip install 'poster-tuner[postgres]'",
        ) from error
    except Exception as error:  # SQLAlchemy's dialects raise errors of their own.
        raise InputError(
            f"the database cannot be opened ({first_line(error)})",
            where=where,
            hint="a SQLAlchemy URL: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE",
        ) from error


def check_cluster(address: str) -> None:
    """Raises InputError if no Ray answers at HOST:PORT (or ray://HOST:PORT).

    Ray speaks gRPC, which is HTTP/2: its greeting is enough to know that somebody is at home.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise InputError(
            "this is no address of a cluster",
            where=f"--address {address}",
            hint="`local`, `auto`, or HOST:PORT of the cluster's head",
        )
    try:
        _within(ANSWER_SECONDS, lambda: _greet((host, int(port))))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray answers there ({error})",
            where=f"--address {address}",
            hint="start a cluster (ray start --head), or leave the flag out for this machine",
        ) from error


def canonical(url: str) -> str:
    """The URL as it is kept and used, from any folder, by Optuna and by MLflow.

    A relative SQLite file becomes absolute. `postgresql://` means psycopg since SQLAlchemy 2.1;
    where only psycopg2 is installed, as by our extra `postgres`, that driver is named.
    """
    if url.startswith("postgresql://") and find_spec("psycopg") is None:
        return url.replace("postgresql://", "postgresql+psycopg2://", 1)
    file = url.removeprefix("sqlite:///")
    if file == url or file in ("", MEMORY):
        return url
    return f"sqlite:///{Path(file).absolute()}"


def without_password(url: str) -> str:
    """The URL, or a text that names one, as it may be shown."""
    hidden = re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", url)
    return re.sub(r"([?&](?:ssl)?passw(?:or)?d=)[^&\s]*", r"\1***", hidden)


def first_line(error: BaseException) -> str:
    """What an error says, in one line and without passwords."""
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0])


def _refuse_open_password(url: str, flag: str) -> None:
    """Raises InputError for a password that ends elsewhere than its writer thinks: the rest of it
    would be shown, and kept, as a host's name."""
    user, _, rest = url.partition("://")[2].rpartition("@")
    is_http = url.startswith(("http://", "https://"))
    if ":" in user and ("@" in user or (is_http and set(user) & set("/?#"))) and "?" not in rest:
        raise InputError(
            "its password holds a character that has a meaning in addresses",
            where=flag,
            hint="write @ as %40, / as %2F, ? as %3F, # as %23; or leave the password out and "
            "set PGPASSWORD (PostgreSQL) or MLFLOW_TRACKING_PASSWORD (MLflow)",
        )


def _ask_health(uri: str) -> None:
    parts = urlsplit(uri)
    # Credentials are MLflow's own affair: they are not sent, so nothing needs to be verified.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        with urllib.request.urlopen(
            f"{url.rstrip('/')}/health", timeout=SOCKET_SECONDS, context=context
        ):
            return
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):  # Somebody is there and wants credentials.
            raise


def _sqlite_file(database: str | None, where: str) -> bool:
    """Whether the file is there. Raises InputError if it could not be made either."""
    if database in (None, "", MEMORY):
        raise InputError("a store in memory is lost", where=where, hint="sqlite:///FILE")
    file = Path(str(database))
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent}", where=where, hint="make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{file} cannot be written", where=where, hint="name another file")
    return file.exists()


def _greet(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=SOCKET_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return  # Only with Ray's certificates would it say more.
        connection.sendall(_HTTP2_GREETING)
        header = connection.recv(9, socket.MSG_WAITALL)
    if len(header) < 9 or header[3] != _SETTINGS:
        raise OSError("the port is something else's")


def _within(seconds: float, job: Callable[[], Found]) -> Found:
    """What `job` returns or raises, or TimeoutError. It runs in a thread that is left behind when
    it takes longer: name look-ups and drivers keep to no limit of ours."""
    ends: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ends.put((job(), None))
        except Exception as error:
            ends.put((None, error))

    threading.Thread(target=run, name="asking", daemon=True).start()
    try:
        found, error = ends.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds} s") from None
    if error is not None:
        raise error
    result: Found = found
    return result
