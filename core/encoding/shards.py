"""One big matrix on disk that any number of workers fill in parts, and nobody fills twice.

A plain `.npy` file, memory-mapped, beside one small JSON record a finished shard of rows with its
checksum. A record appears (atomically) only after its rows are on disk, so a kill at any moment
loses at most the shards in work, and what is damaged later is found and computed again. The
folder's name is a hash of what the matrix is (`spec`), so that the same question finds it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError

SHARD_ROWS = 256
"""Rows of a shard: the most that a kill loses for each worker."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's words for: no room for these bytes."""
USE_FILE = ".use"
"""In a store's folder: locked by those who use it; its time is the store's last use."""


def content_key(spec: Mapping[str, object]) -> str:
    """A name for what `spec` (JSON-able) describes: 24 hex digits of its SHA-256."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class ShardedMatrix:
    """A matrix [num_rows, *row_shape] in `folder`, made there empty if it is not there yet.

    Args:
        folder: where it lives; on storage that all workers see.
        spec: what it is, kept beside it for people (`spec.json`).
        num_rows: rows in all.
        row_shape: shape of one row.
        dtype: numpy type of the values.

    While this object lives, the store is in use (`hold`): nobody removes it.

    Raises:
        InputError: the folder cannot be written, or the disk has no room for the matrix.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spec: Mapping[str, object],
        num_rows: int,
        row_shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        self.folder = folder
        self.num_rows = num_rows
        self.shape = (num_rows, *row_shape)
        self.dtype = np.dtype(dtype)
        self._matrix_path = folder / "matrix.npy"
        try:
            weakref.finalize(self, os.close, _make_and_hold(folder))
            (folder / "shards").mkdir(exist_ok=True)
            write_json(folder / "spec.json", spec)
            self._create()
            self._start = self._data_offset()
        except OSError as error:
            raise self._not_written(error) from error

    @property
    def num_bytes(self) -> int:
        """Size of the matrix when it is full."""
        return self.num_rows * self._row_bytes

    def bytes_of(self, shards: Iterable[int]) -> int:
        """Size of some shards."""
        rows = (self.shard_rows(shard) for shard in shards)
        return sum(int(part.stop - part.start) for part in rows) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * int(self.dtype.itemsize)

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // SHARD_ROWS)

    def shard_rows(self, shard: int) -> slice:
        """The rows of one shard; the last may be shorter."""
        return slice(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self.num_rows))

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self._record(shard).exists()

    def missing_shards(self) -> list[int]:
        """Shards without a record."""
        done = {int(p.stem) for p in (self.folder / "shards").glob("*.json")}
        return [shard for shard in range(self.num_shards) if shard not in done]

    def write_shard(self, shard: int, values: npt.NDArray[Any]) -> None:
        """Put a shard's rows in place, flush them, then leave its record.

        Raises:
            ValueError: values of another shape.
            FloatingPointError: a value is not finite.
            InputError: the disk is full, or the folder cannot be written any more. The shards
                that are there stay.
        """
        rows = self.shard_rows(shard)
        if values.shape != (rows.stop - rows.start, *self.shape[1:]):
            raise ValueError(f"shard {shard} must be {self.shape[1:]} a row, got {values.shape}")
        values = np.ascontiguousarray(values, dtype=self.dtype)
        if self.dtype.kind == "f" and not np.isfinite(values).all():
            raise FloatingPointError(f"shard {shard} of {self.folder} holds values not finite")
        record = {
            "rows": [rows.start, rows.stop],
            "blake2b": _checksum(values.data),
            "by": f"{socket.gethostname()}:{os.getpid()}",
        }
        try:
            with self._matrix_path.open("r+b") as file:
                file.seek(self._offset(rows.start))
                file.write(values.data)
                file.flush()
                os.fsync(file.fileno())
            write_json(self._record(shard), record)
        except OSError as error:
            raise self._not_written(error) from error

    def read_shard(self, shard: int) -> npt.NDArray[Any] | None:
        """A copy of a shard's rows in memory; None if it is not there, or is damaged: then its
        record is forgotten, too."""
        if not self.has(shard):
            return None
        # Read as a file: a page fault of a memory map would stop all threads of this process.
        rows = self.shard_rows(shard)
        values = np.empty((rows.stop - rows.start, *self.shape[1:]), self.dtype)
        with self._matrix_path.open("rb") as file:
            file.seek(self._offset(rows.start))
            num_read = file.readinto(values.data.cast("B"))
        if num_read < values.nbytes or _checksum(values.data) != self._expected(shard):
            self._record(shard).unlink(missing_ok=True)
            return None
        return values

    def verify(self, shards: Iterable[int] | None = None) -> list[int]:
        """Compare finished shards (of those given, or all) with their checksums; forget the
        damaged ones and name them."""
        damaged = []
        matrix = self.open()
        for shard in range(self.num_shards) if shards is None else shards:
            if not self.has(shard):
                continue
            rows = np.ascontiguousarray(matrix[self.shard_rows(shard)])
            if _checksum(rows.data) != self._expected(shard):
                self._record(shard).unlink(missing_ok=True)
                damaged.append(shard)
        return damaged

    def open(self) -> npt.NDArray[Any]:
        """The matrix, memory-mapped and read-only: shared by all processes of a machine."""
        return np.lib.format.open_memmap(self._matrix_path, mode="r")

    def _expected(self, shard: int) -> str | None:
        """The checksum in a shard's record; None if that cannot be read."""
        try:
            checksum: str = json.loads(self._record(shard).read_text())["blake2b"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return checksum

    def _not_written(self, error: OSError) -> InputError:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            free = shutil.disk_usage(self.folder).free
            needed = self.bytes_of(self.missing_shards())
            reason += f": {needed:,} bytes are still needed and {free:,} are free"
        return InputError(
            f"the cache cannot be written ({reason})",
            where=str(self.folder),
            hint="make room (`tuner cache prune` removes what is not in use), or name another "
            "folder with TUNER_HOME; what is computed already stays",
        )

    def _record(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06d}.json"

    def _create(self) -> None:
        """Have whoever comes first make an empty (sparse) file; the others wait, then use it."""
        if not self._fits():
            with _locked(self.folder / ".lock"):
                if not self._fits():
                    self._create_alone()

    def _create_alone(self) -> None:
        room = shutil.disk_usage(self.folder).free
        if room < self.num_bytes:
            raise OSError(f"{self.num_bytes:,} bytes are needed and {room:,} are free")
        for record in (self.folder / "shards").glob("*.json"):
            record.unlink(missing_ok=True)
        draft = self.folder / f".{secrets.token_hex(8)}.npy"
        try:
            np.lib.format.open_memmap(draft, mode="w+", dtype=self.dtype, shape=self.shape)
            os.replace(draft, self._matrix_path)
        finally:
            draft.unlink(missing_ok=True)

    def _fits(self) -> bool:
        """Whether the file there is a matrix of this shape and type, in full length."""
        try:
            matrix = self.open()
        except (ValueError, OSError):
            return False
        return matrix.shape == self.shape and matrix.dtype == self.dtype

    def _offset(self, row: int) -> int:
        """Where a row begins in the file."""
        return self._start + row * self._row_bytes

    def _data_offset(self) -> int:
        matrix = self.open()
        assert isinstance(matrix, np.memmap)
        return int(matrix.offset)


def hold(folder: Path) -> int:
    """Say that a store is in use, until the returned file descriptor is closed or the process
    ends: `remove` leaves it alone. Raises FileNotFoundError if the store is not there."""
    path = folder / USE_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, path):
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)  # Removed while we waited for the lock.


def remove(folder: Path) -> bool:
    """Remove a store for good; False, and nothing is done, while somebody uses it."""
    path = folder / USE_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):
            return False
        # Renamed first: whoever comes now finds all of it or nothing.
        doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def in_use(folder: Path) -> bool:
    """Whether a process holds the store now."""
    try:
        descriptor = os.open(folder / USE_FILE, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _make_and_hold(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return hold(folder)
        except FileNotFoundError:
            continue  # Removed in between.


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; the system frees it when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part. The order of keys
    stays: that of a space's parameters is the order in which a sampler draws them."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(value, indent=1))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _checksum(data: memoryview) -> str:
    return hashlib.blake2b(data.cast("B"), digest_size=16).hexdigest()
