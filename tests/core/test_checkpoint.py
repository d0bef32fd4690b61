"""Checkpoints: whole or not at all, and what a full disk or a damaged file leaves behind."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InputError
from core.finetuning.checkpoint import DRAFT, LAST, PREVIOUS, Checkpoints, num_bytes


def _state(number: int, size: int = 1000) -> dict[str, Any]:
    return {"number": number, "weights": {"a": torch.full((size,), float(number))}, "none": None}


def test_the_last_state_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.load() is None
    for number in (1, 2, 3):
        checkpoints.save(_state(number))
        found = checkpoints.load()
        assert found is not None
        assert (found["number"], found["none"]) == (number, None)
        assert torch.equal(found["weights"]["a"], torch.full((1000,), float(number)))
    assert {p.name for p in checkpoints.folder.iterdir()} == {LAST, PREVIOUS}
    checkpoints.remove()
    assert not checkpoints.folder.exists()
    checkpoints.remove()
    assert checkpoints.load() is None


def test_a_damaged_file_costs_one_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1))
    checkpoints.save(_state(2))
    whole = (tmp_path / LAST).read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", b"no checkpoint", whole[:middle], b"\0" * len(whole)):
        (tmp_path / LAST).write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = checkpoints.load()
        assert found is not None
        assert found["number"] == 1
        assert f"{LAST} is damaged" in caplog.text
    (tmp_path / PREVIOUS).write_bytes(b"")
    assert checkpoints.load() is None


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A file that would run code is left out like a damaged one."""

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was-here"),)

    torch.save({"number": Harmful()}, tmp_path / LAST)
    assert Checkpoints(tmp_path).load() is None
    assert not (tmp_path / "was-here").exists()


def test_a_kill_between_the_renames_leaves_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1))
    (tmp_path / LAST).rename(tmp_path / PREVIOUS)
    found = checkpoints.load()
    assert found is not None
    assert found["number"] == 1
    checkpoints.save(_state(2))
    found = checkpoints.load()
    assert found is not None
    assert found["number"] == 2


def test_a_full_disk_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that takes half of what is written, and knows how much room it has."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1))
    real_open, room = Path.open, 2_000_000

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, room

        def write(self, data: Any) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(real_open(path, mode)))
    usage = type("usage", (), {"free": room})
    monkeypatch.setattr("core.finetuning.checkpoint.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError) as caught:
        checkpoints.save(_state(2, size=1_000_000))
    assert caught.value.where == str(tmp_path)
    assert "it takes 4.0 MB, 2.0 MB more than there is (No space left" in str(caught.value)
    found = checkpoints.load()
    assert found is not None
    assert found["number"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {LAST}


_LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from core.finetuning.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save({"number": 1, "a": torch.zeros(1000)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    checkpoints.save({"number": 2, "a": torch.zeros(1_000_000)})
except Exception as error:
    print(type(error).__name__, error)
print("then", checkpoints.load()["number"])
"""


def test_the_systems_own_refusal(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 0, result.stderr
    assert f"NoRoomError {tmp_path}: no room for a checkpoint: it takes 4.0 MB" in result.stdout
    assert "File too large" in result.stdout
    assert result.stdout.endswith("then 1\n")
    assert not (tmp_path / DRAFT).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: ") as caught:
        Checkpoints(tmp_path / "file" / "trial").save(_state(1))
    assert caught.value.where == str(tmp_path / "file" / "trial")


def test_a_state_that_is_none_of_files_fails_as_itself(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        Checkpoints(tmp_path).save({"lambda": lambda: None})
    assert Checkpoints(tmp_path).load() is None


def test_size_counts_each_storage_once() -> None:
    weights = torch.zeros(1000)
    assert num_bytes({"a": weights, "b": [weights[:10], {"c": torch.zeros(5)}], "d": 3}) == 4020
