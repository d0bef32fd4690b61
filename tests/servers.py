"""Servers that tests and benchmarks start on this machine's loopback, and stop by their own process
id: a real MLflow, a real PostgreSQL that can be stopped and started again meanwhile."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 300
UNPRIVILEGED = ("postgres", "nobody")
"""PostgreSQL refuses to run as root: one of these runs it then."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class MlflowServer:
    """`mlflow server` on a store, that can be stopped or killed and started again. `jobs`: with its
    seven job consumers, its default, which poll all the time and take a core."""

    def __init__(self, store: str, folder: Path, *, jobs: bool = False, port: int | None = None):
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store,
            "--artifacts-destination", str(folder / "served"), "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": str(jobs).lower()}
        self._log = folder / f"server-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=os.environ | self._environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        _wait(f"{self.address}/health", self._process)

    def stop(self) -> None:
        """Nothing is left of it, whether it runs or not."""
        if self._process is not None:
            _stop_group(self._process)
            self._process = None

    def kill(self) -> None:
        """At once, as by a power cut."""
        assert self._process is not None, "it does not run"
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


@contextmanager
def mlflow_server(
    store: str, folder: Path, *, jobs: bool = False, port: int | None = None
) -> Iterator[str]:
    """A server that runs while the block does; yields its address. `port`: that of a server that
    was there before, to start it again."""
    server = MlflowServer(store, folder, jobs=jobs, port=port)
    try:
        server.start()
        yield server.address
    finally:
        server.stop()


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """A PostgreSQL cluster of its own. It runs when it is handed over."""

    binaries: Path
    root: Path
    port: int
    user: str | None
    """Who runs it; None for ourselves."""

    @property
    def url(self) -> str:
        """SQLAlchemy's."""
        return f"postgresql+psycopg2://bench@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.root}"
        )
        self._control("-o", options, "start")

    def stop(self) -> None:
        """At once, as by a power cut: connections break, what was committed is kept."""
        self._control("-m", "immediate", "stop")

    def _control(self, *arguments: str) -> None:
        program, data = str(self.binaries / "pg_ctl"), str(self.root / "data")
        log = str(self.root / "log")
        _as_user(self.user, [program, "-D", data, "-w", "-l", log, *arguments])

    @property
    def running(self) -> bool:
        return (self.root / "data" / "postmaster.pid").exists()


@contextmanager
def postgres_server(folder: Path) -> Iterator[Postgres | None]:
    """A new PostgreSQL cluster, that can be stopped and started; None where there is none to run.
    `folder`: where else it would lie, if it could."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    binaries = programs[0] if programs else Path(found).parent if found else None
    if binaries is None or find_spec("psycopg2") is None:
        yield None
        return
    user = _unprivileged()
    # Its owner must reach it: a test's or a benchmark's own folder is closed to others.
    root = Path(tempfile.mkdtemp(prefix="bench-postgres-", dir="/tmp"))
    server = Postgres(binaries=binaries, root=root, port=free_port(), user=user)
    try:
        if user:
            shutil.chown(root, user)
        initdb = [str(binaries / "initdb"), "-D", str(root / "data"), "-U", "bench"]
        _as_user(user, [*initdb, "-A", "trust"])
        server.start()
        try:
            yield server
        finally:
            if server.running:
                server.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def postgres(folder: Path) -> Iterator[str | None]:
    """A new PostgreSQL cluster; yields SQLAlchemy's URL, or None where there is none to run."""
    with postgres_server(folder) as server:
        yield server.url if server else None


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
    try:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    except ProcessLookupError:
        server.wait()
