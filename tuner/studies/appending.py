"""Appending lines to a study's files: whole or not at all, by one process at a time.

A disk that is full leaves half a line behind, which spoils a file once more is written to it. The
lock is the system's, which ends with its process.
"""

from __future__ import annotations

import fcntl
import os
from io import FileIO
from pathlib import Path

from core.errors import InputError


def append_whole(path: Path, lines: bytes, *, waits: bool = True) -> None:
    """Append whole lines to a file of a study's folder and bring them to the disk; without `waits`
    the system does so in its own time, or the next call that waits.

    Raises InputError, and leaves the file as it was, where that fails. Half a line at its end, of a
    process that was killed, is cut off.
    """
    try:
        _append(path, lines, waits)
    except OSError as error:
        raise InputError(
            f"the study cannot be written ({error.strerror})",
            where=str(path),
            hint="what was written is kept; make room on this disk, then: "
            f"tuner resume {path.parent.name}",
        ) from error


def _append(path: Path, lines: bytes, waits: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = _whole_lines(file)
        file.truncate(end)
        file.seek(end)
        try:
            rest = lines
            while rest:
                rest = rest[file.write(rest) :]
            if waits:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _whole_lines(file: FileIO) -> int:
    """The offset at which the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    step = 4096
    while end:
        start = max(0, end - step)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0
