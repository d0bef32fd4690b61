"""Addresses of MLflow, databases and Ray handed in wrong, through the real command: exit code 2,
a message that says where it is, what is wrong and what would be right, no traceback, and nothing
written."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tuner.addresses

Run = Callable[..., Any]


@pytest.fixture
def deaf_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that takes connections and never says a word. Patience is cut to a second."""
    assert tuner.addresses.ANSWER_SECONDS <= 8, "said within 15 s, with the time to start"
    monkeypatch.setattr(tuner.addresses, "ANSWER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


DATABASE = "postgresql://me:secret@127.0.0.1:{port}/optuna"
SERVERS = [
    ("--tracking-uri", "http://127.0.0.1:{port}", "no MLflow server answers", "mlflow server"),
    ("--tracking-uri", DATABASE, "the database cannot be opened", "postgresql://USER"),
    ("--storage", DATABASE, "the database cannot be opened", "postgresql://USER"),
    ("--address", "127.0.0.1:{port}", "no Ray answers there", "ray start --head"),
    ("--address", "ray://127.0.0.1:{port}", "no Ray answers there", "ray start --head"),
]


@pytest.mark.parametrize(("flag", "address", "problem", "hint"), SERVERS)
def test_nobody_answers(
    flag: str, address: str, problem: str, hint: str,
    refused: Run, data: Path, space: Path, deaf_port: int,
) -> None:  # fmt: skip
    for port, reason in {1: "refused", deaf_port: "no answer within 1 s"}.items():
        where = f"{flag} {address.format(port=port)}".replace("secret", "***")
        started = time.monotonic()
        message = refused(
            "search", space, "--data", data, flag, address.format(port=port),
            says=(where, problem, reason, hint),
        )  # fmt: skip
        assert time.monotonic() - started < 45, "their own limits are minutes"
        assert "secret" not in message


def test_something_else_answers(
    refused: Run, monkeypatch: pytest.MonkeyPatch, data: Path, space: Path
) -> None:
    """A port of another service: it greets in its own way and hangs up."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        threading.Thread(target=greet, daemon=True).start()
        port = server.getsockname()[1]
        for flag, address, problem, hint in SERVERS:
            refused(
                "search", space, "--data", data, flag, address.format(port=port),
                says=(flag, problem, hint),
            )  # fmt: skip
        server.shutdown(socket.SHUT_RDWR)


ADDRESSES: list[tuple[str, str, tuple[str, ...]]] = [
    ("--tracking-uri", "somewhere", ("no address of MLflow", "http://HOST:PORT")),
    ("--tracking-uri", "sqlite:////nowhere/mlflow.db", ("no folder /nowhere", "make it first")),
    ("--tracking-uri", "sqlite://", ("in memory", "sqlite:///FILE")),
    ("--tracking-uri", "gopher://x", ("cannot be opened", "postgresql://USER")),
    ("--storage", "somewhere", ("cannot be opened", "sqlite:///FILE")),
    ("--storage", "sqlite:////nowhere/optuna.db", ("no folder /nowhere", "make it first")),
    ("--storage", "sqlite:///:memory:", ("in memory", "sqlite:///FILE")),
    ("--address", "somewhere", ("no address of a cluster", "HOST:PORT")),
    ("--address", "127.0.0.1:x", ("no address of a cluster", "HOST:PORT")),
    ("--address", "127.0.0.1:99999", ("no Ray answers", "ray start")),
]


@pytest.mark.parametrize(("flag", "address", "says"), ADDRESSES)
def test_address(
    flag: str, address: str, says: tuple[str, ...], refused: Run, data: Path, space: Path
) -> None:
    where = f"{flag} {address}"
    refused("search", space, "--data", data, flag, address, says=(where, *says))


def test_database_without_a_driver(
    refused: Run, monkeypatch: pytest.MonkeyPatch, data: Path, space: Path
) -> None:
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.setattr(tuner.addresses, "find_spec", lambda _: None)
    refused(
        "search", space, "--data", data, "--storage", "postgresql://me@127.0.0.1:1/optuna",
        says=("--storage postgresql://me@", "no driver for this", "poster-tuner[postgres]"),
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--tracking-uri", "--storage"])
def test_file_that_is_no_database(
    flag: str, refused: Run, data: Path, space: Path, tmp_path: Path
) -> None:
    file = tmp_path / "notes.db"
    file.write_text("these are notes, and no database " * 10)
    refused("search", space, "--data", data, flag, f"sqlite:///{file}", says=("notes.db", "not a"))
    assert file.read_text().startswith("these are notes")


def test_auto_without_a_cluster(
    refused: Run, monkeypatch: pytest.MonkeyPatch, data: Path, space: Path
) -> None:
    """Ray's look-up is replaced: it would find, and join, whatever runs on this machine."""
    from ray._private import services

    def none_found(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address", none_found)
    common = ("search", space, "--data", data, "--address", "auto")
    refused(*common, says=("--address auto", "no Ray runs on this machine", "ray start --head"))
    # A cluster that was killed leaves its address behind.
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _: "127.0.0.1:1")
    refused(*common, says=("--address 127.0.0.1:1", "no Ray answers there"))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_model_of_a_dead_server(command: str, refused: Run, data: Path) -> None:
    rest = (data / "0.png",) if command == "predict" else ("--data", data)
    refused(
        command, "models:/posters/1", *rest, "--tracking-uri", "http://127.0.0.1:1",
        says=("--tracking-uri http://127.0.0.1:1", "no MLflow server answers"),
    )  # fmt: skip
