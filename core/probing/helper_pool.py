"""Processes that train groups of heads beside this one, started once and used again and again.

A helper is a Python of its own (`helper`) at the other end of two pipes; it ends when its pipe
does, however this process ends. One that takes a cohort's groups is sent the features by the name
of their file where they have one. Nothing waits for a helper to start: until it is ready, cohorts
train without it. Nothing here imports torch, so that helpers can start before this process has.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from ..encoding.inputs import FloatMatrix
    from .fold import Task
    from .group import Group, GroupState, Part, Source

MAX_HELPERS = 15
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
class SourceFiles:
    """A `Source` as it is sent."""

    features: FloatMatrix | MatrixFile
    further_views: Mapping[str, FloatMatrix | MatrixFile]

    @staticmethod
    def of(source: Source) -> SourceFiles:
        views = {name: by_name(matrix) for name, matrix in source.further_views.items()}
        return SourceFiles(features=by_name(source.features), further_views=views)

    def open(self) -> Source:
        from .group import Source

        views = {name: _opened(matrix) for name, matrix in self.further_views.items()}
        return Source(features=_opened(self.features), further_views=views)


def _opened(matrix: FloatMatrix | MatrixFile) -> FloatMatrix:
    return matrix.open() if isinstance(matrix, MatrixFile) else matrix


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Build the groups of these parts, in the place of all groups before."""

    parts: Mapping[int, Part]
    """By the groups' keys."""
    sources: Sequence[SourceFiles]
    task: Task


@dataclass(frozen=True, kw_only=True)
class Take:
    """One more group, that another process had."""

    key: int
    state: GroupState


@dataclass(frozen=True, kw_only=True)
class Give:
    """Send this group back, and forget it."""

    key: int


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
    """Those that take part in one cohort: at most so many, and at first none; see `look`."""

    def __init__(
        self, helpers: Sequence[Helper], count: int, sources: Sequence[Source], task: Task
    ) -> None:
        self._all = list(helpers)
        self._count = count
        self._sources = [SourceFiles.of(source) for source in sources] if helpers else []
        self._task = task
        self._taking: list[Helper] = []

    def __len__(self) -> int:
        """How many take part."""
        return len(self._taking)

    def look(self) -> list[int]:
        """The places of those that have become ready, which take part now: let them `begin`."""
        new = [helper for helper in self._all if helper not in self._taking and helper.ready]
        before = len(self._taking)
        self._taking += new[: max(0, self._count - before)]
        return list(range(before, len(self._taking)))

    def begin(self, place: int, parts: Mapping[int, Part]) -> None:
        """Have the helper at this place train these parts, and nothing else."""
        self._taking[place].send(Begin(parts=parts, sources=self._sources, task=self._task))

    def take(self, place: int, key: int, state: GroupState) -> None:
        """Have the helper at this place go on with a group."""
        self._taking[place].send(Take(key=key, state=state))

    def give(self, place: int, key: int) -> GroupState:
        """What became of a group, which the helper at this place gives up."""
        self._taking[place].send(Give(key=key))
        state: GroupState = self._taking[place].receive()
        return state

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
def lent_helpers(count: int, sources: Sequence[Source], task: Task) -> Iterator[Helpers]:
    """At most so many helpers, for one cohort; none while another cohort of this process has
    them. After an error all end: nobody knows what they are at."""
    if not _lock.acquire(blocking=False):
        yield Helpers([], count, sources, task)
        return
    try:
        yield Helpers(_helpers, count, sources, task)
    except BaseException:
        number = len(_helpers)
        while _helpers:
            _helpers.pop().end(at_once=True)
        _helpers.extend(Helper() for _ in range(number))
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
