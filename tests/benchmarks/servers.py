"""Servers that benchmarks start on this machine's loopback and stop by their own process id."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 60
UNPRIVILEGED = ("postgres", "nobody")
"""PostgreSQL refuses to run as root: one of these runs it then."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mlflow_server(store: str, folder: Path, *, jobs: bool = False) -> Iterator[str]:
    """`mlflow server` on a store; yields its address. `jobs`: with its seven job consumers, its
    default, which poll all the time and take a core."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store,
        "--artifacts-destination", str(folder / "served"), "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    log = (folder / f"server-{port}.log").open("w")
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": str(jobs).lower()}
    with (
        log,
        subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop_group(server)


@contextmanager
def postgres(folder: Path) -> Iterator[str | None]:
    """A new PostgreSQL cluster; yields SQLAlchemy's URL, or None where there is none to run."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    binaries = programs[0] if programs else Path(found).parent if found else None
    if binaries is None or find_spec("psycopg2") is None:
        yield None
        return
    user = _unprivileged()
    # Its owner must reach it: the benchmark's own folder is closed to others.
    root = Path(tempfile.mkdtemp(prefix="bench-postgres-", dir="/tmp"))
    data, port = root / "data", free_port()
    try:
        if user:
            shutil.chown(root, user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root}"
        _as_user(user, [str(binaries / "initdb"), "-D", str(data), "-U", "bench", "-A", "trust"])
        control = [str(binaries / "pg_ctl"), "-D", str(data), "-w", "-l", str(root / "log")]
        _as_user(user, [*control, "-o", options, "start"])
        try:
            yield f"postgresql+psycopg2://bench@127.0.0.1:{port}/postgres"
        finally:
            _as_user(user, [*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _unprivileged() -> str | None:
    """Whom to run PostgreSQL as; None for ourselves."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in UNPRIVILEGED if name in known)


def _as_user(user: str | None, command: list[str]) -> None:
    prefix = ["setpriv", "--reuid", user, "--regid", _group(user), "--clear-groups"] if user else []
    done = subprocess.run(
        [*prefix, *command],
        cwd="/tmp",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if "initdb" in command[0] else subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}")


def _group(user: str) -> str:
    return str(pwd.getpwnam(user).pw_gid)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(f"nothing answers at {url}")


def _stop_group(server: subprocess.Popen[bytes]) -> None:
    """The server and the workers that it started, all in a group of their own."""
    import signal

    try:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
