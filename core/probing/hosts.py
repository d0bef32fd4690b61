"""Where the groups of a cohort train: side by side, in threads or in processes.

On a CPU each group has one core. Threads of one process also share Python's lock, and with few
heads a step is mostly Python: so other processes host a part of the groups where there are any
(`helper_pool`). Whoever hosts a group computes the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar

import torch

from .group import Group, Part, Sources, Task, build_groups
from .helper_pool import lent_helpers

SWITCH_SECONDS = 0.0002
"""How long a thread keeps Python's lock while others want it (Python's own: 0.005): an operation
of a step takes less."""
COPIES_BYTES = 1 << 30
"""Each process scales the features for itself: no more memory than this for the copies."""

T = TypeVar("T")


class Each(Protocol):
    """Applies a function to the group of every part."""

    def __call__(self, function: Callable[[Group], T], /) -> list[T]: ...


@contextmanager
def side_by_side(
    parts: Sequence[Part], sources: Sources, task: Task, device: torch.device | str
) -> Iterator[Each]:
    """Yields a function that applies another one to the group of every part, in any order, and
    returns the results. How long a call takes is what the slowest takes.

    The function is a method of `Group`, or a `functools.partial` of one, and what it takes and
    returns can be pickled: another process may be the one to call it.
    """
    num_threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or min(num_threads, len(parts)) < 2:
        groups = build_groups(parts, sources, task, device)

        def in_turn(function: Callable[[Group], T], /) -> list[T]:
            return [function(group) for group in groups]

        yield in_turn
        return
    with ExitStack() as stack:
        helpers = stack.enter_context(lent_helpers(min(num_threads, len(parts)) - 1))
        copies = len(helpers) * _bytes_scaled(sources, task)
        shares = _shares(parts, 1 + (len(helpers) if copies <= COPIES_BYTES else 0))
        helpers.begin(shares[1:], sources, task)
        groups = build_groups(shares[0], sources, task, device)
        own = stack.enter_context(in_threads(max(1, num_threads // len(shares))))

        def each(function: Callable[[Group], T], /) -> list[T]:
            helpers.ask(function)
            try:
                results = own(function, groups)
            finally:
                theirs = helpers.answers()
            return [*results, *theirs]

        yield each


@contextmanager
def in_threads(
    num_threads: int,
) -> Iterator[Callable[[Callable[[Group], T], Sequence[Group]], list[T]]]:
    """Yields a function that applies another one to groups, in threads of one core each."""
    before, switch = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)  # Of each thread; torch knows no other way to say it.
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        if num_threads == 1:
            yield lambda function, groups: [function(group) for group in groups]
            return
        with ThreadPoolExecutor(num_threads) as threads:
            yield lambda function, groups: list(threads.map(function, groups))
    finally:
        sys.setswitchinterval(switch)
        torch.set_num_threads(before)


def _shares(parts: Sequence[Part], count: int) -> list[list[Part]]:
    """The parts dealt out to so many processes, the costliest first, each to whoever has least."""
    shares: list[list[Part]] = [[] for _ in range(min(count, len(parts)))]
    loads = [0.0] * len(shares)
    for part in sorted(parts, key=_cost, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(part)
        loads[least] += _cost(part)
    return shares


def _cost(part: Part) -> float:
    """About what its epochs take, in no unit: heads times steps."""
    return sum(1 / config.batch_size for config in part.configs.values())


def _bytes_scaled(sources: Sources, task: Task) -> int:
    """Of the features that a process holds in memory."""
    matrices = [sources.features, *sources.further_views]
    if sources.features.ndim == 3:
        return 0  # Maps stay on disk.
    return 4 * len(task.folds) * sum(matrix.size for matrix in matrices)
