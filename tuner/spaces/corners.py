"""Whether every trial of a search space can run, and reads what is searched.

What a trial may be is known by `TrialConfig` alone. So instead of a second list of rules, settings
are put together from the corners of the space (each choice, each bound) and built; the first that
`TrialConfig` refuses is reported at the key to blame.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.errors import InputError

from .domain import Parameter, Value, plain
from .source import Source

if TYPE_CHECKING:
    from .space import SearchSpace

_MAX_CONTEXTS = 5_000
_CONTEXTS_PER_VALUE = 8
_NUM_RANDOM = 300


def check_corners(space: SearchSpace, source: Source) -> None:
    """Build a `TrialConfig` in every corner worth looking into."""
    reached: set[str] = set()
    for values, branches in _corners(space):
        reached |= branches
        settings = {name: plain(value) for name, value in values.items()}
        try:
            TrialConfig.from_dict(settings)
        except InputError as error:
            raise _corner_error(space, source, values, error) from error
        _check_read(space, source, values)
    if next(islice(space.contexts(), _MAX_CONTEXTS, None), None) is not None:
        return  # Too many to have been through all: a branch not met proves nothing.
    for parameter in space.parameters.values():
        for index, branch in enumerate(parameter.branches):
            if branch.key not in reached:
                raise source.error(
                    "no trial ever meets its condition", *branch_path(parameter, index)
                )


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Which values of another setting make a setting be read."""

    decider: str
    values: frozenset[Value] | None
    """The values that read it; None: all but 0."""

    def reads(self, value: Value) -> bool:
        return value != 0 if self.values is None else value in self.values

    def condition(self, taken: Collection[Value]) -> str:
        """The `when:` to write, of the values that the decider takes."""
        values = sorted(map(str, self.values)) if self.values else map(plain, taken)
        reading = [str(value) for value in values if value != 0]
        return f"{{{self.decider}: [{', '.join(reading)}]}}"


@cache
def _readers() -> dict[str, _Reader]:
    """Setting -> the setting that decides whether it is read, most of them from the registries."""
    from core.heads import HEADS
    from core.losses import LOSSES
    from core.optimizers import OPTIMIZERS
    from core.schedules import SCHEDULES

    readers: dict[str, _Reader] = {}
    kinds: dict[str, Mapping[str, Any]] = {
        "head": HEADS,
        "loss": LOSSES,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
    }
    for decider, registry in kinds.items():
        for name in {name for record in registry.values() for name in record.parameters}:
            reading = frozenset(k for k, record in registry.items() if name in record.parameters)
            readers[name] = _Reader(decider=decider, values=reading)
    pooled = frozenset(kind for kind, head in HEADS.items() if not head.spatial)
    for name in ("pooling", "blocks"):
        readers[name] = _Reader(decider="head", values=pooled)
    for name in ("unfreeze_epochs", "layer_lr_decay", "batch_norm"):
        readers[name] = _Reader(decider="unfrozen_stages", values=None)
    readers["randaugment_ops"] = _Reader(decider="randaugment_magnitude", values=None)
    return readers


def is_read(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a trial with `settings` reads its setting `name`."""
    reader = _readers().get(name)
    if reader is None:
        return True
    return reader.reads(settings.get(reader.decider, getattr(TrialConfig, reader.decider)))


def _check_read(space: SearchSpace, source: Source, values: Mapping[str, Value]) -> None:
    """Nothing is searched where it is not read: the sampler would learn from noise."""
    for name, reader in _readers().items():
        if name not in values or is_read(name, values):
            continue
        parameter = space.parameters[name]
        index = next(i for i, branch in enumerate(parameter.branches) if branch.holds(values))
        if len(parameter.branches[index].domain.extremes()) == 1:
            continue
        decider = reader.decider
        decided = values.get(decider, getattr(TrialConfig, decider))
        raise source.error(
            f"{name} is searched where {decider} is {decided}, which does not read it",
            *branch_path(parameter, index),
            hint=_read_hint(space, reader),
        )


def _read_hint(space: SearchSpace, reader: _Reader) -> str:
    if reader.decider not in space.parameters:
        return f"leave it out, or give {reader.decider}, too"
    branches = space.parameters[reader.decider].branches
    taken = [value for branch in branches for value in branch.domain.values() or ()]
    return f"add `when: {reader.condition(taken)}`"


def _corner_error(
    space: SearchSpace, source: Source, values: dict[str, Value], error: InputError
) -> InputError:
    """The refusal of a corner at the key to blame, with the settings that lead there."""
    key = error.where or "backbone"
    # Of settings left out, such as an mlp's hidden sizes, what reads them is to blame.
    reader = _readers().get(key)
    decider = reader.decider if reader else key
    place = next((name for name in (key, decider) if name in space.parameters), None)
    if place is None:
        return source.error(error.problem, "parameters", hint=error.hint)
    parameter = space.parameters[place]
    active = [i for i, branch in enumerate(parameter.branches) if branch.holds(values)]
    path = branch_path(parameter, active[0]) if active else ("parameters", place)
    related = {*space.condition_parents(), decider, *re.findall(r"\w+", error.problem)} - {key}
    corner = ", ".join(f"{n}: {plain(v)}" for n, v in values.items() if n in related)
    absent = "" if key in values else f" and no {key}"
    hint = f"a trial could have {corner}{absent}" if corner else None
    return source.error(error.problem, *path, hint=error.hint or hint)


def _corners(space: SearchSpace) -> Iterator[tuple[dict[str, Value], set[str]]]:
    """Settings at the corners, with the keys of the branches they use: for each assignment of the
    parameters that conditions read, each extreme of every other one; then random combinations."""
    tested: dict[tuple[str, Value], int] = {}
    for context in islice(space.contexts(), _MAX_CONTEXTS):
        base, branches = _complete(space, context, None)
        yield base, set(branches.values())
        for name, key in branches.items():
            if name in context:
                continue
            branch = next(b for b in space.parameters[name].branches if b.key == key)
            for value in branch.domain.extremes():
                if tested.get((key, value), 0) < _CONTEXTS_PER_VALUE:
                    tested[(key, value)] = tested.get((key, value), 0) + 1
                    yield {**base, name: value}, {key}
    chance = random.Random(0)
    for _ in range(_NUM_RANDOM):
        values, branches = _complete(space, {"mode": space.mode}, chance)
        yield values, set(branches.values())


def _complete(
    space: SearchSpace, given: Mapping[str, Value], chance: random.Random | None
) -> tuple[dict[str, Value], dict[str, str]]:
    """`given` completed with the first extreme of every other parameter, or a random one."""
    values: dict[str, Value] = {"mode": space.mode}
    branches: dict[str, str] = {}
    for name, parameter in space.parameters.items():
        branch = parameter.active(values)
        if branch is None:
            continue
        branches[name] = branch.key
        extremes = branch.domain.extremes()
        chosen = chance.choice(extremes) if chance else extremes[0]
        values[name] = given.get(name, chosen)
    return values, branches


def branch_path(parameter: Parameter, index: int) -> tuple[str | int, ...]:
    several = (index,) if len(parameter.branches) > 1 else ()
    return ("parameters", parameter.name, *several)
