"""Fixtures of the tests of `core`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

_TINY = Path(__file__).with_name("tiny_finetuning.py")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch has two threads, and what it had before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The fine-tuning of seconds in `tiny_finetuning.py`."""
    spec = importlib.util.spec_from_file_location("tiny_finetuning", _TINY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start_tiny() -> Callable[[Path, dict[str, Any]], subprocess.Popen[str]]:
    """Starts `tiny_finetuning.py` in a process of its own, with these settings."""

    def start(folder: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
        file = folder / f"settings-{settings.get('rank', 0)}.json"
        file.write_text(json.dumps(settings))
        return subprocess.Popen(
            [sys.executable, str(_TINY), str(file)],
            env={**os.environ, "PYTHONPATH": str(_TINY.parents[2]), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
