"""The sharded matrix: killed, damaged, raced for and out of room, it never serves wrong values."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import core
from core.encoding import shards
from core.encoding.shards import SHARD_ROWS, ShardedMatrix, content_key, write_json
from core.errors import InputError

ROWS, WIDTH = 2 * SHARD_ROWS + 9, 5
SPEC = {"backbone": "ffn", "pooling": "avg"}
REPOSITORY = Path(core.__file__).parents[1]

# What a worker process runs before its own lines.
PRELUDE = f"""
import os, signal, sys, time
from pathlib import Path
import numpy as np
from core.encoding import shards
from core.encoding.shards import ShardedMatrix

def make(folder, num_rows={ROWS}):
    return ShardedMatrix(
        Path(folder), spec={SPEC!r}, num_rows=num_rows, row_shape=({WIDTH},), dtype="float32")

def values(matrix, shard):
    rows = matrix.shard_rows(shard)
    whole = np.arange(matrix.num_rows * {WIDTH}, dtype=np.float32).reshape(-1, {WIDTH})
    return whole[rows] + 1
"""


def _make(folder: Path, num_rows: int = ROWS, dtype: str = "float32") -> ShardedMatrix:
    return ShardedMatrix(folder, spec=SPEC, num_rows=num_rows, row_shape=(WIDTH,), dtype=dtype)


def _whole(num_rows: int = ROWS) -> np.ndarray:
    return np.arange(num_rows * WIDTH, dtype=np.float32).reshape(-1, WIDTH) + 1


def _fill(matrix: ShardedMatrix) -> list[int]:
    """Compute what is missing, as a worker does; returns which shards that were."""
    missing = matrix.missing_shards()
    for shard in missing:
        matrix.write_shard(shard, _whole(matrix.num_rows)[matrix.shard_rows(shard)])
    return missing


def _worker(lines: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + lines, *map(str, arguments)], cwd=REPOSITORY
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_a_filled_matrix_holds_what_was_written(tmp_path: Path, dtype: str) -> None:
    matrix = _make(tmp_path / "m", dtype=dtype)
    assert (matrix.num_shards, matrix.missing_shards()) == (3, [0, 1, 2])
    assert matrix.num_bytes == ROWS * WIDTH * np.dtype(dtype).itemsize
    whole = (_whole() % 200).astype(dtype)
    for shard in (2, 0, 1):
        assert not matrix.has(shard)
        matrix.write_shard(shard, whole[matrix.shard_rows(shard)])
        assert matrix.has(shard)
    assert matrix.missing_shards() == []
    assert np.array_equal(matrix.open(), whole)
    assert np.array_equal(np.load(tmp_path / "m" / "matrix.npy"), whole)  # a plain file of numpy
    assert matrix.verify() == []


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    _fill(_make(tmp_path))
    again = _make(tmp_path)
    assert again.missing_shards() == []
    assert np.array_equal(again.open(), _whole())
    with pytest.raises(ValueError, match="read-only"):
        again.open()[0] = 0


def test_spec_is_kept_for_people_and_names_the_folder(tmp_path: Path) -> None:
    _make(tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text()) == SPEC
    key = content_key(SPEC)
    assert key == content_key(dict(reversed(SPEC.items())))
    assert key != content_key({**SPEC, "pooling": "max"})
    assert len(key) == 24
    assert set(key) <= set("0123456789abcdef")


KILLED_AT = {
    "before_the_rows_are_on_disk": "shards.os.fsync = die",
    "before_the_record": "shards.write_json = die",
    "while_the_record_is_put_in_place": "shards.os.replace = die",
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_kill_loses_the_shard_in_work_and_no_other(tmp_path: Path, moment: str) -> None:
    lines = f"""
matrix = make(sys.argv[1])
matrix.write_shard(0, values(matrix, 0))
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
{KILLED_AT[moment]}
matrix.write_shard(1, values(matrix, 1))
"""
    assert _worker(lines, tmp_path).wait(timeout=60) == -signal.SIGKILL
    matrix = _make(tmp_path)
    assert matrix.verify() == []
    assert _fill(matrix) == [1, 2]
    assert np.array_equal(matrix.open(), _whole())


def test_a_worker_killed_from_outside_is_resumed(tmp_path: Path) -> None:
    lines = """
matrix = make(sys.argv[1], num_rows=20_000)
for shard in matrix.missing_shards():
    matrix.write_shard(shard, values(matrix, shard))
    time.sleep(0.02)
"""
    worker = _worker(lines, tmp_path)
    third = tmp_path / "shards" / "000002.json"
    deadline = time.monotonic() + 60
    while not third.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    worker.kill()
    worker.wait(timeout=60)
    matrix = _make(tmp_path, num_rows=20_000)
    assert matrix.verify() == []
    done = set(range(matrix.num_shards)) - set(_fill(matrix))
    assert {0, 1, 2} <= done
    assert len(done) < matrix.num_shards
    assert np.array_equal(matrix.open(), _whole(20_000))


def test_processes_that_create_one_matrix_at_once_share_it(tmp_path: Path) -> None:
    """Each writes its own shard the moment it has the matrix; none of them may be lost."""
    workers, rounds = 3, 25
    lines = """
worker, rounds = int(sys.argv[2]), int(sys.argv[3])
Path(sys.argv[1], f"ready{worker}").touch()
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
start = float(Path(sys.argv[1], "go").read_text())
for turn in range(rounds):
    while time.time() < start + 0.03 * turn:
        pass
    matrix = make(Path(sys.argv[1], str(turn)))
    matrix.write_shard(worker, values(matrix, worker))
"""
    running = [_worker(lines, tmp_path, worker, rounds) for worker in range(workers)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write_json(tmp_path / "go", time.time() + 0.1)
    assert [process.wait(timeout=60) for process in running] == [0] * workers
    for turn in range(rounds):
        matrix = _make(tmp_path / str(turn))
        assert matrix.missing_shards() == []
        assert np.array_equal(matrix.open(), _whole())


def test_a_damaged_shard_is_found_and_only_it_is_computed_again(tmp_path: Path) -> None:
    matrix = _make(tmp_path)
    _fill(matrix)
    writable = np.load(tmp_path / "matrix.npy", mmap_mode="r+")
    writable[SHARD_ROWS + 3, 2] += 1
    writable.flush()
    assert matrix.verify([0, 2]) == []
    assert matrix.verify() == [1]
    assert _fill(matrix) == [1]
    assert matrix.verify() == []
    assert np.array_equal(matrix.open(), _whole())


@pytest.mark.parametrize("text", ["", "{}", "null", "[1]", '{"blake2b": 3}', "\udcff"])
def test_a_damaged_record_counts_as_a_damaged_shard(tmp_path: Path, text: str) -> None:
    matrix = _make(tmp_path)
    _fill(matrix)
    record = tmp_path / "shards" / "000002.json"
    record.write_bytes(text.encode(errors="surrogateescape"))
    assert matrix.verify() == [2]
    assert matrix.missing_shards() == [2]


@pytest.mark.parametrize("damage", ["shorter", "other shape", "not a matrix", "gone"])
def test_a_damaged_file_is_made_anew_and_all_shards_with_it(tmp_path: Path, damage: str) -> None:
    _fill(_make(tmp_path))
    file = tmp_path / "matrix.npy"
    if damage == "shorter":
        os.truncate(file, file.stat().st_size - 1000)
    elif damage == "other shape":
        np.save(file, np.zeros((3, 3)))
    elif damage == "not a matrix":
        file.write_bytes(b"hello")
    else:
        file.unlink()
    matrix = _make(tmp_path)
    assert matrix.missing_shards() == [0, 1, 2]
    _fill(matrix)
    assert np.array_equal(matrix.open(), _whole())
    assert not list(tmp_path.glob(".*.npy"))


def test_wrong_values_are_never_recorded(tmp_path: Path) -> None:
    matrix = _make(tmp_path)
    with pytest.raises(ValueError, match=r"shard 2 must be \(5,\) a row, got \(256, 5\)"):
        matrix.write_shard(2, _whole()[:SHARD_ROWS])
    values = _whole()[:SHARD_ROWS]
    values[7, 1] = np.nan
    with pytest.raises(FloatingPointError, match=r"shard 0 of .* not finite"):
        matrix.write_shard(0, values)
    assert matrix.missing_shards() == [0, 1, 2]


def test_a_full_disk_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = ROWS * WIDTH * 4
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(10**9, 0, needed - 1))
    with pytest.raises(InputError, match="10,420 bytes are needed and 10,419 are free") as caught:
        _make(tmp_path / "m")
    assert caught.value.where == str(tmp_path / "m")
    assert not (tmp_path / "m" / "matrix.npy").exists()
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(10**9, 0, needed))
    _fill(_make(tmp_path / "m"))
    # What is there already needs no room.
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(10**9, 0, 0))
    assert _make(tmp_path / "m").missing_shards() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_is_said_and_what_is_there_stays(small_disk: Path) -> None:
    """Room for the matrix when it is made (it is sparse), but somebody else takes it."""
    width = 100
    values = np.ones((SHARD_ROWS, width), np.float32)
    matrix = ShardedMatrix(
        small_disk / "m", spec=SPEC, num_rows=2 * SHARD_ROWS, row_shape=(width,), dtype="float32"
    )
    matrix.write_shard(0, values)
    (small_disk / "other").write_bytes(b"x" * 100_000)
    message = r"No space left on device: 102,400 bytes are still needed and [\d,]+ are free"
    with pytest.raises(InputError, match=message) as caught:
        matrix.write_shard(1, values)
    assert caught.value.where == str(small_disk / "m")
    assert "tuner cache prune" in str(caught.value) and "TUNER_HOME" in str(caught.value)
    assert matrix.missing_shards() == [1]
    assert matrix.verify() == []
    (small_disk / "other").unlink()
    matrix.write_shard(1, values)
    assert matrix.missing_shards() == matrix.verify() == []
    assert (matrix.open() == 1).all()


def test_a_file_that_may_not_grow_is_said_too(tmp_path: Path) -> None:
    """Where nothing can be mounted: the system's limit on the size of a file, in a process."""
    lines = f"""
import resource
from core.errors import InputError
matrix = make(sys.argv[1])
matrix.write_shard(0, values(matrix, 0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = 128 + {SHARD_ROWS * WIDTH * 4}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    matrix.write_shard(1, values(matrix, 1))
except InputError as error:
    assert "File too large: 5,300 bytes are still needed" in error.problem, error
    sys.exit(0 if matrix.missing_shards() == [1, 2] and matrix.verify() == [] else 4)
"""
    assert _worker(lines, tmp_path).wait(timeout=60) == 0
    assert _fill(_make(tmp_path)) == [1, 2]


def test_a_shard_is_read_back_or_forgotten(tmp_path: Path) -> None:
    matrix = _make(tmp_path)
    assert matrix.read_shard(1) is None
    _fill(matrix)
    assert np.array_equal(matrix.read_shard(2), _whole()[2 * SHARD_ROWS :])
    writable = np.load(tmp_path / "matrix.npy", mmap_mode="r+")
    writable[SHARD_ROWS + 3, 2] += 1
    writable.flush()
    assert matrix.read_shard(1) is None
    assert matrix.missing_shards() == [1]
    os.truncate(tmp_path / "matrix.npy", (tmp_path / "matrix.npy").stat().st_size - 8)
    assert matrix.read_shard(2) is None
    assert np.array_equal(matrix.read_shard(0), _whole()[:SHARD_ROWS])


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot be written(.|\n)*TUNER_HOME"):
        _make(tmp_path / "file" / "m")


def test_json_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]
