"""Fixtures that every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .servers import Postgres, postgres_server

# Before torch is imported: threads that wait for each other must not keep the cores from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _folder_from(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names a folder that this test needs")
    folder = Path(value)
    assert folder.is_dir(), f"{variable}={value} is not a folder"
    return folder


@pytest.fixture(scope="session")
def posters_dir() -> Path:
    """The real posters (a folder with train.csv and Images/), from POSTERS_DIR."""
    return _folder_from("POSTERS_DIR")


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """A folder of pretrained weights, from WEIGHTS_DIR."""
    return _folder_from("WEIGHTS_DIR")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL of the test module's own, which may be stopped and started again."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        if server is None:
            pytest.skip("there is no PostgreSQL here (initdb), or no psycopg2")
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: such small pictures gain nothing from more, and lose much where cores
    are shared."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def quiet_optuna() -> Iterator[None]:
    """No line a trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)
