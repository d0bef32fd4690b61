"""A search space: the parameters of a study, their ranges, and when each of them exists.

The file (YAML) is read by `space_file`, checked by `space_check` against what `core` can run, and
becomes the frozen `SearchSpace` below. It speaks to Optuna in both directions: `suggest` asks for a
trial, `to_params` and `from_params` translate between settings and what Optuna stores.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.errors import InputError

from ..goals.costs import COSTS
from ..sampling.pruners import PrunerSpec
from ..sampling.samplers import SamplerSpec
from .domain import Constant, Parameter, Value, plain

if TYPE_CHECKING:
    import optuna

# Beside this package in a checkout and once installed. (importlib.resources cannot read a folder
# without code from an editable installation.)
_SHIPPED = Path(__file__).parents[2] / "search_spaces"


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a study searches. Made by `load_space` or `parse_space`, which check it.

    A space of two parts is its probe part, with the part that goes on from there in `finetune`.
    """

    name: str
    description: str
    mode: str
    """`probe` or `finetune`, for every trial."""
    objective: str
    """The validation metric that is maximised."""
    minimised: tuple[str, ...] = ()
    """Costs that are objectives, too: of `tuner.goals.costs.COSTS`."""
    constraints: Mapping[str, float] = field(default_factory=dict)
    """Bounds on what a model may be, by their names in `tuner.goals.constraints.LIMITS`."""
    trials: int
    """Default budget."""
    cohort_size: int
    """Trials asked for in one round."""
    sampler: SamplerSpec
    pruner: PrunerSpec
    parameters: Mapping[str, Parameter]
    """By name; those that conditions read come before those that they decide."""
    points: tuple[dict[str, Any], ...] = ()
    """Flat mappings to try first; a parameter left out is left to the sampler."""
    finetune: SearchSpace | None = None
    """What the best probes of this space are fine-tuned in."""
    from_probes: int = 0
    """How many of the best probes are the first points of `finetune`."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The settings of `trial`: a flat, JSON-able mapping for `TrialConfig.from_dict`."""
        values: dict[str, Value] = {"mode": self.mode}
        for parameter in self.parameters.values():
            branch = parameter.active(values)
            if branch is not None:
                values[parameter.name] = branch.suggest(trial)
        return {name: plain(value) for name, value in values.items()}

    def from_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that Optuna stored as `params`: what `suggest` returned for that trial.

        Raises InputError if the space lacks one of them, or they lack one that it asks for.
        """
        values: dict[str, Value] = {"mode": self.mode}
        read = set()
        for parameter in self.parameters.values():
            branch = parameter.active(values)
            if branch is None:
                continue
            if isinstance(branch.domain, Constant):
                values[parameter.name] = branch.domain.value
                continue
            if branch.key not in params:
                raise InputError(f"the trial has no {branch.key!r}", where=f"space {self.name}")
            read.add(branch.key)
            values[parameter.name] = branch.decode(params[branch.key])
        unread = sorted(set(params) - read)
        if unread:
            raise InputError(
                f"the trial's {', '.join(unread)} are not part of it",
                where=f"space {self.name}",
                hint="the trial was made with another space",
            )
        return {name: plain(value) for name, value in values.items()}

    def to_params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """`point`, some or all settings of a trial, as parameters for `study.enqueue_trial`.

        What is left out is left to the sampler, except where another setting depends on it.
        Raises InputError, naming the key, for a setting that is no part of the space, does not
        apply beside the others, or is out of its range.
        """
        from .points import point_to_params

        return point_to_params(point, mode=self.mode, parameters=self.parameters)

    def fit(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The part of `settings`, made in another space, that a point of this one can hold, and
        the names of the rest."""
        from .points import fitting_point

        return fitting_point(settings, mode=self.mode, parameters=self.parameters)

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that trials are judged by: as objectives, or under a constraint."""
        return tuple(c for c in COSTS if c in self.minimised or c in self.constraints)

    @property
    def parts(self) -> list[SearchSpace]:
        """The space, and what its best are fine-tuned in, if there is that."""
        return [self] if self.finetune is None else [self, self.finetune]

    @property
    def finetunes(self) -> bool:
        """Whether it has fine-tuning trials, in this part or the next."""
        return self.mode == "finetune" or self.finetune is not None

    @property
    def max_epochs(self) -> int:
        """The most epochs that any trial can ask for."""
        if "epochs" not in self.parameters:
            return TrialConfig.epochs
        ends = (b.domain.extremes() for b in self.parameters["epochs"].branches)
        return max(int(end) for extremes in ends for end in extremes)  # type: ignore[arg-type]

    def endless(self) -> list[str]:
        """The parameters with endlessly many values: real ranges without a step."""
        return [
            p.name
            for p in self.parameters.values()
            if any(b.domain.values() is None for b in p.branches)
        ]

    def size(self) -> int | None:
        """How many different configurations there are, or None if there is no end of them."""
        if self.endless():
            return None
        parents = self.condition_parents()
        rest = [p for p in self.parameters.values() if p.name not in parents]
        return sum(
            math.prod(
                len(branch.domain.values() or ())
                for branch in (p.active(context) for p in rest)
                if branch is not None
            )
            for context in self.contexts()
        )

    def condition_parents(self) -> set[str]:
        """The parameters that some condition reads."""
        return {name for p in self.parameters.values() for name in p.parents()}

    def contexts(self) -> Iterator[dict[str, Value]]:
        """Every assignment of the parameters that conditions read (all of them finite)."""
        parents = self.condition_parents()
        return _assignments([p for p in self.parameters.values() if p.name in parents], self.mode)

    def assignments(self, names: Collection[str]) -> Iterator[dict[str, Value]]:
        """Every assignment of these parameters and of those that their conditions read; all of
        them must be finite. Those that do not apply are absent."""
        needed: set[str] = set()
        pending = [name for name in names if name in self.parameters]
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                pending += self.parameters[name].parents()
        return _assignments([p for p in self.parameters.values() if p.name in needed], self.mode)

    def configurations(self) -> Iterator[dict[str, Any]]:
        """Every configuration of a finite space as Optuna's parameters, in the file's order."""
        for values in _assignments(list(self.parameters.values()), self.mode):
            yield self.to_params(values)

    def to_dict(self) -> dict[str, Any]:
        """As YAML or JSON; `parse_space` reads it back."""
        shared = {"name": self.name, "description": self.description, **self._goals()}
        if self.finetune is None:
            return {**shared, "mode": self.mode, **self._part()}
        finetune = {"from_probes": self.from_probes, **self.finetune._part()}
        return {**shared, "probe": self._part(), "finetune": finetune}

    def _goals(self) -> dict[str, Any]:
        """What both parts of a space share."""
        goals: dict[str, Any] = {"objective": self.objective}
        if self.minimised:
            goals = {"objectives": [self.objective, *self.minimised]}
        return goals | ({"constraints": dict(self.constraints)} if self.constraints else {})

    def _part(self) -> dict[str, Any]:
        """What each part of a space has for itself."""
        return {
            "trials": self.trials,
            "cohort_size": self.cohort_size,
            "sampler": {"name": self.sampler.name, **self.sampler.options},
            "pruner": {"name": self.pruner.name, **self.pruner.options},
            "parameters": {name: p.to_dict() for name, p in self.parameters.items()},
            "points": [dict(point) for point in self.points],
        }

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides which trials there can be and how they are compared: mode,
        objectives, constraints and parameters. A study may be resumed with more trials or another
        sampler."""
        part: dict[str, Any] = {
            "mode": self.mode,
            **self._goals(),
            "parameters": {name: p.to_dict() for name, p in self.parameters.items()},
        }
        if self.finetune is not None:
            part["finetune"] = self.finetune.fingerprint()
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


def load_space(path_or_name: str | Path) -> SearchSpace:
    """The search space in a YAML file, or a shipped one by its name (`probe`).

    Raises InputError for a file that is missing or does not describe a space that `core` can run.
    """
    from .file import parse_space, read_space_file

    shipped = shipped_spaces()
    path = Path(path_or_name)
    if isinstance(path_or_name, str) and path_or_name in shipped:
        path = shipped[path_or_name]
    if not path.exists():
        close = difflib.get_close_matches(path.stem, shipped, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"there is no search space {str(path_or_name)!r}",
            hint=f"{guess}give a YAML file, or one of: {', '.join(sorted(shipped))}",
        )
    values, source = read_space_file(path)
    return parse_space(values, name=path.stem, source=source)


def shipped_spaces() -> dict[str, Path]:
    """The spaces that come with the product: name -> YAML file."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.yaml"))}


def _assignments(parameters: list[Parameter], mode: str) -> Iterator[dict[str, Value]]:
    """Every assignment of `parameters` that their conditions allow, the last one fastest."""

    def walk(index: int, values: dict[str, Value]) -> Iterator[dict[str, Value]]:
        if index == len(parameters):
            yield values
            return
        branch = parameters[index].active(values)
        if branch is None:
            yield from walk(index + 1, values)
            return
        for value in branch.domain.values() or ():
            yield from walk(index + 1, {**values, parameters[index].name: value})

    return walk(0, {"mode": mode})
