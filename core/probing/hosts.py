"""Where the groups of a cohort train: side by side, in threads or in processes.

On a CPU each group has one core. Threads of one process also share Python's lock, and with few
heads a step is mostly Python: so other processes host a part of the groups where there are any
(`helper_pool`). When heads leave, or a helper has started, groups move to whoever has least to do.
Whoever hosts a group computes the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar

import torch

from ..precision import product_type
from .fold import Task
from .group import Group, GroupBuilder, Part, Source
from .helper_pool import Helpers, lent_helpers
from .kept_inputs import KeptInputs

SWITCH_SECONDS = 0.0002
"""How long a thread keeps Python's lock while others want it (Python's own: 0.005): an operation
of a step takes less."""
COPIES_BYTES = 1 << 30
"""Each process scales the features for itself: no more memory than this for the copies."""
WORTH_MOVING = 0.9
"""A group moves if an epoch then takes less than this share of its time."""
SETTLED = 2
"""After this epoch groups are shared out by what they took: the first one also starts things."""

T = TypeVar("T")


class Crew(Protocol):
    """All groups of a cohort, wherever they are."""

    def each(self, function: Callable[[Group], T], /) -> list[T]:
        """Apply a function to every group, in any order; how long it takes is what the slowest
        takes. The function is a method of `Group`, or a `functools.partial` of one, and what it
        takes and returns can be pickled: another process may be the one to call it."""
        ...

    def balance(self, ended: Collection[int], seconds: Mapping[int, float]) -> None:
        """Share the groups out anew if that helps, now that the trials at these places have
        ended; `seconds` is what the epoch took, by place."""
        ...


@contextmanager
def side_by_side(
    parts: Sequence[Part],
    sources: Sequence[Source],
    task: Task,
    device: torch.device | str,
    kept: KeptInputs,
) -> Iterator[Crew]:
    """The groups of these parts, on a CPU side by side on as many cores as torch has threads."""
    builder = GroupBuilder(sources, task, kept.of_cohort(sources, device))
    num_threads = min(torch.get_num_threads(), len(parts))
    if torch.device(device).type != "cpu" or num_threads < 2:
        yield _InTurn([builder.begin(part) for part in parts])
        return
    with ExitStack() as stack:
        # The copies of all processes fit the memory, or there is one process.
        copy = max(1, sum(_bytes_scaled(source, task) for source in sources))
        helpers = stack.enter_context(
            lent_helpers(min(num_threads - 1, COPIES_BYTES // copy), sources, task)
        )
        stack.enter_context(_one_core_each())
        yield stack.enter_context(_Shared(parts, builder, helpers, num_threads))


class _InTurn:
    """All groups in this process, one after the other."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def each(self, function: Callable[[Group], T], /) -> list[T]:
        return [function(group) for group in self._groups]

    def balance(self, ended: Collection[int], seconds: Mapping[int, float]) -> None:
        pass


class _Shared:
    """Groups by the place of their part. Host 0 is this process, with a thread for each core that
    no helper has; the others are helpers."""

    def __init__(
        self,
        parts: Sequence[Part],
        builder: GroupBuilder,
        helpers: Helpers,
        num_threads: int,
    ) -> None:
        self._seconds_of = [dict(part.seconds) for part in parts]
        """Of the running trials of each part: as guessed, then as the last epoch took."""
        self._epochs = 0
        self._builder = builder
        self._helpers = helpers
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads)
        self._own: dict[int, Group] = {}
        """Of this process."""
        ready = helpers.look()
        self._host_of = dealt_out(self._costs(), self._cores())
        for place in ready:
            theirs = {key: parts[key] for key, h in enumerate(self._host_of) if h == 1 + place}
            helpers.begin(place, theirs)
        for key, host in enumerate(self._host_of):
            if host == 0:
                self._own[key] = self._builder.begin(parts[key])

    def __enter__(self) -> _Shared:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()

    def each(self, function: Callable[[Group], T], /) -> list[T]:
        self._helpers.ask(function)
        try:
            results = self._own_results(function)
        finally:
            theirs = self._helpers.answers()
        return [*results, *theirs]

    def _own_results(self, function: Callable[[Group], T]) -> list[T]:
        """Of groups dealt out to this process' threads as they are to hosts."""
        groups = list(self._own.values())
        count = self._cores()[0]
        if count == 1:
            return [function(group) for group in groups]
        costs = self._costs()
        thread_of = dealt_out([costs[key] for key in self._own], [1] * count)

        def of_thread(thread: int) -> list[T]:
            return [function(g) for g, t in zip(groups, thread_of, strict=True) if t == thread]

        return [result for some in self._threads.map(of_thread, range(count)) for result in some]

    def balance(self, ended: Collection[int], seconds: Mapping[int, float]) -> None:
        for of_part in self._seconds_of:
            for place in ended:
                of_part.pop(place, None)
            of_part.update({place: seconds[place] for place in of_part if place in seconds})
        self._epochs += 1
        ready = self._helpers.look()
        for helper in ready:
            self._helpers.begin(helper, {})
        if ready or ended or self._epochs == SETTLED:
            for key, host in moves(self._costs(), self._host_of, self._cores()).items():
                self._move(key, host)

    def _costs(self) -> list[float]:
        """Seconds of an epoch of every group."""
        return [sum(seconds.values()) for seconds in self._seconds_of]

    def _cores(self) -> list[int]:
        """Of every host."""
        return [self._num_threads - len(self._helpers), *[1] * len(self._helpers)]

    def _move(self, key: int, host: int) -> None:
        before = self._host_of[key]
        self._host_of[key] = host
        state = self._own.pop(key).state if before == 0 else self._helpers.give(before - 1, key)
        if host == 0:
            self._own[key] = self._builder.go_on(state)
        else:
            self._helpers.take(host - 1, key, state)


def dealt_out(costs: Sequence[float], cores: Sequence[int]) -> list[int]:
    """The host of each place: the costliest first, each to whoever is then done first."""
    loads = [0.0] * len(cores)
    host_of = [0] * len(costs)
    for key in sorted(range(len(costs)), key=lambda key: -costs[key]):
        ends = [(load + costs[key]) / num for load, num in zip(loads, cores, strict=True)]
        host_of[key] = ends.index(min(ends))
        loads[host_of[key]] += costs[key]
    return host_of


def moves(costs: Sequence[float], hosts: Sequence[int], cores: Sequence[int]) -> dict[int, int]:
    """Where some places had better be than on the hosts where they are: from the host that is done
    last to the one that is done first, one by one, while it is worth it."""
    host_of = list(hosts)
    while True:
        times = [0.0] * len(cores)
        for cost, host in zip(costs, host_of, strict=True):
            times[host] += cost / cores[host]
        last, first = times.index(max(times)), times.index(min(times))
        after = {
            key: max(times[last] - cost / cores[last], times[first] + cost / cores[first])
            for key, (cost, host) in enumerate(zip(costs, host_of, strict=True))
            if host == last and cost > 0
        }
        best = min(after, key=lambda key: after[key], default=None)
        if best is None or after[best] >= WORTH_MOVING * times[last]:
            return {key: host for key, host in enumerate(host_of) if host != hosts[key]}
        host_of[best] = first


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Meanwhile each thread computes on one core."""
    before, switch = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)  # Of each thread; torch knows no other way to say it.
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(switch)
        torch.set_num_threads(before)


def _bytes_scaled(source: Source, task: Task) -> int:
    """Of the features that a process holds in memory: in float32, and as products take them."""
    if source.features.ndim == 3:
        return 0  # Maps stay on disk.
    matrices = [source.features, *source.further_views.values()]
    types = {torch.float32, product_type(task.precision)}
    each = sum(kind.itemsize for kind in types)
    return each * len(task.folds) * sum(matrix.size for matrix in matrices)
