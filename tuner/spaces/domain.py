"""What one parameter of a search space may be: a choice, a range or a constant, and when.

Each domain knows how to ask Optuna, and how to translate between a value and what Optuna stores
(its categories are plain scalars, so a list is stored as JSON). A parameter is a list of branches;
the first whose condition holds is the one that exists. Each branch has an Optuna name of its own
(`lr|optimizer=sgd`), because Optuna wants one distribution for one name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from core.errors import InputError

if TYPE_CHECKING:
    import optuna

Value: TypeAlias = str | int | float | bool | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One value; Optuna never hears of it."""

    value: Value

    def values(self) -> Sequence[Value] | None:
        return [self.value]

    def extremes(self) -> Sequence[Value]:
        return [self.value]

    def contains(self, value: Value) -> bool:
        return value == self.value

    def to_dict(self) -> dict[str, Any]:
        return {"constant": plain(self.value)}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values, without an order."""

    options: tuple[Value, ...]

    def values(self) -> Sequence[Value] | None:
        return list(self.options)

    def extremes(self) -> Sequence[Value]:
        return list(self.options)

    def contains(self, value: Value) -> bool:
        return value in self.options

    def to_dict(self) -> dict[str, Any]:
        return {"choice": [plain(option) for option in self.options]}


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers if the parameter is an int.

    `log`: equal ratios are equally likely. `step`: only low, low + step, ... are taken.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def values(self) -> Sequence[Value] | None:
        """All values, or None if there is no end of them."""
        if self.whole:
            return range(int(self.low), int(self.high) + 1, int(self.step or 1))
        if self.step is None:
            return [self.low] if self.low == self.high else None
        count = int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step)))
        return [self._at(i) for i in range(count + 1)]

    def extremes(self) -> Sequence[Value]:
        return [self.low, self.high]

    def contains(self, value: Value) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        nearest = self.nearest(value)
        return self.low <= nearest <= self.high and math.isclose(value, nearest, rel_tol=1e-9)

    def nearest(self, value: float) -> float:
        """The value of the range's steps that is meant: Optuna's third step of 0.3 is 0.8999..."""
        if self.whole:
            steps = round((value - self.low) / (self.step or 1))
            return int(self.low) + steps * int(self.step or 1)
        return value if self.step is None else self._at(round((value - self.low) / self.step))

    def _at(self, index: int) -> float:
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step)))

    def to_dict(self) -> dict[str, Any]:
        step = {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high} | ({"log": True} if self.log else {}) | step


Domain: TypeAlias = Constant | Choice | Range


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A domain, the condition under which it holds, and the name Optuna knows it by."""

    key: str
    """Optuna's name for it: the parameter's, with the condition where there are several."""
    when: Mapping[str, tuple[Value, ...]]
    """Parameter -> the values under which this branch exists; all must hold. Empty: always."""
    domain: Domain

    def holds(self, values: Mapping[str, Value]) -> bool:
        """Whether the branch exists beside `values`; a parameter that is absent meets nothing."""
        return all(name in values and values[name] in valid for name, valid in self.when.items())

    def suggest(self, trial: optuna.Trial) -> Value:
        """The value that the trial's sampler proposes."""
        domain = self.domain
        if isinstance(domain, Constant):
            return domain.value
        if isinstance(domain, Choice):
            return self.decode(trial.suggest_categorical(self.key, self.stored_options()))
        if domain.whole:
            low, high, step = int(domain.low), int(domain.high), int(domain.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=domain.log)
        return self.decode(
            trial.suggest_float(self.key, domain.low, domain.high, step=domain.step, log=domain.log)
        )

    def stored_options(self) -> list[str | int | float | bool | None]:
        """The categories of a choice as Optuna stores them."""
        assert isinstance(self.domain, Choice)
        return [encode(option) for option in self.domain.options]

    def decode(self, stored: Any) -> Value:
        """The value that Optuna stored as `stored`.

        Raises InputError if it is none of the branch's: the trial was made with another space.
        """
        if isinstance(self.domain, Choice):
            for option in self.domain.options:
                if encode(option) == stored:
                    return option
        elif self.domain.contains(stored):
            return self.domain.nearest(stored) if isinstance(self.domain, Range) else stored
        raise InputError(f"{stored!r} is outside {self.domain.to_dict()}", where=self.key)

    def to_dict(self) -> dict[str, Any]:
        """As it would be written in YAML."""
        if not self.when:
            return self.domain.to_dict()
        when = {name: [plain(v) for v in valid] for name, valid in self.when.items()}
        return self.domain.to_dict() | {"when": when}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A setting of a trial (a field of `TrialConfig`) and its branches, first match first."""

    name: str
    branches: tuple[Branch, ...]

    def active(self, values: Mapping[str, Value]) -> Branch | None:
        """The branch that exists beside `values`, or None if the parameter does not apply."""
        return next((branch for branch in self.branches if branch.holds(values)), None)

    def parents(self) -> list[str]:
        """The parameters that its conditions read, in the order of the file."""
        return list(dict.fromkeys(name for branch in self.branches for name in branch.when))

    def to_dict(self) -> dict[str, Any] | list[dict[str, Any]]:
        """As it would be written in YAML."""
        written = [branch.to_dict() for branch in self.branches]
        return written[0] if len(written) == 1 else written


def plain(value: Value) -> str | int | float | bool | list[int] | None:
    """The value as JSON and YAML write it."""
    return list(value) if isinstance(value, tuple) else value


def encode(value: Value) -> str | int | float | bool | None:
    """The value as an Optuna category; a list as JSON, since Optuna stores scalars only."""
    return json.dumps(list(value)) if isinstance(value, tuple) else value


def branch_key(name: str, when: Mapping[str, tuple[Value, ...]]) -> str:
    """`lr|optimizer=adam,adamw`: the Optuna name of one branch among several."""
    if not when:
        return f"{name}|otherwise"
    conditions = (
        f"{parent}={','.join(str(encode(value)) for value in valid)}"
        for parent, valid in when.items()
    )
    return f"{name}|{'&'.join(conditions)}"
