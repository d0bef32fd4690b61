"""Processes that train groups of heads beside this one, started once and used again and again.

A helper is a Python of its own (`helper`) at the other end of two pipes; it ends when its pipe
does, however this process ends. One that takes a cohort's groups is sent the features by the name
of their file where they have one. Nothing waits for a helper to start: until it is ready, cohorts
train without it.
"""

from __future__ import annotations

import atexit
import mmap
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

import numpy as np

from ..encoding.inputs import FloatMatrix
from .group import Group, Part, Sources, Task

MAX_HELPERS = 7
"""Each takes memory for a torch of its own."""
END_SECONDS = 5.0
READY = "ready"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MatrixFile:
    """A matrix that the other process finds on the disk."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def open(self) -> FloatMatrix:
        return np.memmap(
            self.file, mode="r", dtype=self.dtype, shape=self.shape, offset=self.offset
        )


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Build these groups, in the place of those before."""

    parts: Sequence[Part]
    features: FloatMatrix | MatrixFile
    further_views: Sequence[FloatMatrix | MatrixFile]
    task: Task


@dataclass(frozen=True, kw_only=True)
class Apply:
    """Apply a function to every group."""

    function: Callable[[Group], Any]


class Helper:
    """One helper process, as this process sees it."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "core.probing.helper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ready(self) -> bool:
        """Whether it has started and lives; never waits. One that could not start never is."""
        if self._process.poll() is not None:
            return False
        if not self._ready and select.select([self._output], [], [], 0)[0]:
            try:
                self._ready = self.receive() == READY
            except RuntimeError:  # Its output has ended: it is about to.
                return False
        return self._ready

    def send(self, message: object) -> None:
        """Raises RuntimeError if it has died."""
        try:
            pickle.dump(message, self._input, protocol=pickle.HIGHEST_PROTOCOL)
            self._input.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def receive(self) -> Any:
        """What it answers. Raises RuntimeError if it has died, and what went wrong in it."""
        try:
            answer = pickle.load(self._output)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._died() from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self, *, at_once: bool = False) -> None:
        """Have it end, after what it is doing unless `at_once`."""
        if at_once:
            self._process.kill()
        with suppress(BrokenPipeError):  # It died with a message unread.
            self._input.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    @property
    def _input(self) -> IO[bytes]:
        return cast("IO[bytes]", self._process.stdin)

    @property
    def _output(self) -> IO[bytes]:
        return cast("IO[bytes]", self._process.stdout)

    def _died(self) -> RuntimeError:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return RuntimeError(
            f"a process that trained heads ended (exit code {code}); -9 is often for want of memory"
        )


class Helpers:
    """Those that take part in one cohort."""

    def __init__(self, helpers: Sequence[Helper]) -> None:
        self._all = list(helpers)
        self._taking: list[Helper] = []
        """Those that have groups."""

    def __len__(self) -> int:
        return len(self._all)

    def begin(self, shares: Sequence[Sequence[Part]], sources: Sources, task: Task) -> None:
        """Give each share of the parts to a helper."""
        self._taking = self._all[: len(shares)]
        for helper, parts in zip(self._taking, shares, strict=True):
            helper.send(
                Begin(
                    parts=parts,
                    features=by_name(sources.features),
                    further_views=[by_name(matrix) for matrix in sources.further_views],
                    task=task,
                )
            )

    def ask(self, function: Callable[[Group], object]) -> None:
        """Have all apply a function to their groups; `answers` waits for them."""
        for helper in self._taking:
            helper.send(Apply(function=function))

    def answers(self) -> list[Any]:
        """Of all groups. Raises what went wrong with one, once all have answered."""
        results: list[Any] = []
        failure: Exception | None = None
        for helper in self._taking:
            try:
                results += helper.receive()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return results


_lock = threading.Lock()
"""Held by the cohort that uses the helpers."""
_helpers: list[Helper] = []


def start_helpers(count: int) -> None:
    """Have so many helpers (at most MAX_HELPERS) start, besides those that run; returns at once."""
    with _lock:
        while len(_helpers) < min(count, MAX_HELPERS):
            _helpers.append(Helper())


def end_helpers() -> None:
    """End all helpers; later cohorts train without, unless some are started again."""
    with _lock:
        while _helpers:
            _helpers.pop().end()


@contextmanager
def lent_helpers(count: int) -> Iterator[Helpers]:
    """At most so many helpers that are ready, for one cohort; none while another cohort of this
    process has them. After an error all end: nobody knows what they are at."""
    if not _lock.acquire(blocking=False):
        yield Helpers([])
        return
    try:
        yield Helpers([helper for helper in _helpers if helper.ready][:count])
    except BaseException:
        count = len(_helpers)
        while _helpers:
            _helpers.pop().end(at_once=True)
        _helpers.extend(Helper() for _ in range(count))
        raise
    finally:
        _lock.release()


def by_name(matrix: FloatMatrix) -> FloatMatrix | MatrixFile:
    """A whole memory-mapped file by its name; anything else as it is."""
    base: object = matrix.base
    # A part of a map has the whole as its base, and says nothing of where it begins.
    if not isinstance(matrix, np.memmap) or not isinstance(base, mmap.mmap):
        return matrix
    if matrix.filename is None or not matrix.flags.c_contiguous:
        return matrix
    return MatrixFile(
        file=str(matrix.filename),
        dtype=matrix.dtype.str,
        shape=matrix.shape,
        offset=matrix.offset,
    )


atexit.register(end_helpers)
