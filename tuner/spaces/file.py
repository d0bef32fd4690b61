"""From a search space's file, or the same mapping from JSON, to a checked `SearchSpace`.

Pydantic models say what keys there are and of which type; they also make the JSON schema. Values
are brought to the types of `TrialConfig`'s fields, so that `1` and `1.0` are one learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from core.config import TrialConfig, coerce
from core.errors import InputError

from ..goals.constraints import ConstraintsSection
from ..goals.costs import COSTS
from ..sampling.options import check_name, check_options
from ..sampling.pruners import PRUNERS, PrunerSpec
from ..sampling.samplers import SAMPLERS, SamplerSpec
from .domain import (
    Branch,
    Choice,
    Constant,
    Domain,
    Parameter,
    Range,
    Value,
    branch_key,
    plain,
)
from .source import Source, read_yaml, validated
from .space import SearchSpace

FIELDS = {f.name: str(f.type) for f in dataclasses.fields(TrialConfig)}
"""The parameters there can be, with the annotation of each."""

NUMBERS = ("int", "int | None", "float", "float | None")
"""The annotations that a range fits."""


MAX_STEPS = 1_000_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Objective = Literal["top3_accuracy", "mean_average_precision"]
SCORES = get_args(Objective)
_SEVERAL: list[str] = Field(
    default=[], description="In place of objective, several: a metric to maximise, then one or two "
    f"of {', '.join(COSTS)} to minimise. The result is a Pareto front.",
    json_schema_extra={
        "items": {"enum": [*SCORES, *COSTS]}, "minItems": 1, "maxItems": 1 + len(COSTS)
    },
)  # fmt: skip
_CONSTRAINTS: dict[str, Any] = Field(default={}, description="What a model must keep to win.")


class PartSection(_Section):
    """What each part of a two-part space has, and a space of one part beside its name."""

    trials: int = Field(default=100, ge=1, description="How many trials, unless --trials is given.")
    cohort_size: int = Field(
        default=64, ge=1, description="Trials asked for in one round, at most."
    )
    sampler: Any = Field(default="tpe", description="Who proposes trials.")
    pruner: Any = Field(
        default="successive_halving", description="Who stops trials that fall behind."
    )
    parameters: dict[str, Any] = Field(description="The settings of a trial, by name.")
    points: list[dict[str, Any]] = Field(
        default=[], description="Trials to start with; what is left out, the sampler chooses."
    )


class SpaceSection(PartSection):
    """A search space: the parameters of a study, their ranges, and when each of them exists."""

    name: str = Field(default="", description="Default: the file's name without its ending.")
    description: str = Field(default="", description="One line for `tuner space list`.")
    mode: Literal["probe", "finetune"] = Field(
        default="probe",
        description="probe: train heads on features of frozen backbones; finetune: train backbone "
        "layers too.",
    )
    objective: Objective = Field(
        default="top3_accuracy", description="The validation metric to maximise."
    )
    objectives: list[str] = _SEVERAL
    constraints: dict[str, Any] = _CONSTRAINTS


class FinetuneSection(PartSection):
    """The second part of a two-part space: fine-tuning that starts from the best probes."""

    trials: int = Field(
        default=100, ge=1, description="How many trials, unless --finetune-trials is given."
    )
    from_probes: int = Field(
        default=4, ge=0, description="How many of the best probes are its first points."
    )


class TwoPartSection(_Section):
    """A search space of two parts: probes first, then fine-tuning that starts from the best."""

    name: str = Field(default="", description="Default: the file's name without its ending.")
    description: str = Field(default="", description="One line for `tuner space list`.")
    objective: Objective = Field(
        default="top3_accuracy", description="The validation metric to maximise, in both parts."
    )
    objectives: list[str] = _SEVERAL
    constraints: dict[str, Any] = _CONSTRAINTS
    probe: dict[str, Any] = Field(
        description="Heads on features of frozen backbones; what `mode: probe` searches."
    )
    finetune: dict[str, Any] = Field(
        description="Backbone layers too, from the best probes on; what `mode: finetune` searches."
    )


PARTS = ("probe", "finetune")
"""The keys of a space's parts."""


class ConstantSection(_Section):
    """One value for all trials."""

    constant: Any = Field(description="The value.")
    when: dict[str, Any] = Field(default={}, description="The values of others it depends on.")


class ChoiceSection(_Section):
    """One of several values."""

    choice: list[Any] = Field(description="The values to choose from.")
    when: dict[str, Any] = Field(default={}, description="The values of others it depends on.")


class RangeSection(_Section):
    """A number between two bounds."""

    low: float = Field(description="The smallest value, included.")
    high: float = Field(description="The largest value, included.")
    log: bool = Field(default=False, description="Equal ratios are equally likely.")
    step: float | None = Field(default=None, gt=0, description="Only low, low + step, ...")
    when: dict[str, Any] = Field(default={}, description="The values of others it depends on.")


def read_space_file(path: Path) -> tuple[dict[str, Any], Source]:
    """The mapping in a space's YAML file, and where each key stands."""
    return read_yaml(path)


def parse_space(
    values: Mapping[str, Any],
    *,
    name: str = "",
    source: Source | None = None,
    after_probes: bool = False,
) -> SearchSpace:
    """A checked space from the mapping that a file holds or `SearchSpace.to_dict` returned.

    `name` is taken if the mapping has none. `after_probes`: it is the fine-tuning part of another
    space by itself. Raises InputError that points at file, line and key.
    """
    source = source or Source(name=name or str(values.get("name", "search space")))
    if any(part in values for part in PARTS):
        return _parse_two_parts(values, name, source)
    section = validated(SpaceSection, dict(values), source)
    shared = {
        "name": section.name or name,
        "description": section.description,
        **_goals(section, source),
        "mode": section.mode,
    }
    return _parse_part(section, shared, source, after_probes=after_probes)


def _parse_two_parts(values: Mapping[str, Any], name: str, source: Source) -> SearchSpace:
    """The probe part, which holds the fine-tuning part."""
    written = validated(TwoPartSection, dict(values), source)
    shared = {
        "name": written.name or name,
        "description": written.description,
        **_goals(written, source),
    }
    below = source.below("probe")
    section = validated(PartSection, written.probe, below)
    probe = _parse_part(section, {**shared, "mode": "probe"}, below)
    below = source.below("finetune")
    further = validated(FinetuneSection, written.finetune, below)
    finetune = _parse_part(further, {**shared, "mode": "finetune"}, below, after_probes=True)
    return dataclasses.replace(probe, finetune=finetune, from_probes=further.from_probes)


def _parse_part(
    section: PartSection, shared: Mapping[str, Any], source: Source, *, after_probes: bool = False
) -> SearchSpace:
    """A checked space of one part; `shared`: its name, description, mode and `_goals`."""
    from .check import check_space, in_order

    sampler = SamplerSpec(**_split_name(section.sampler, "sampler", source))
    check_name("sampler", sampler.name, SAMPLERS, source)
    check_options("sampler", sampler, SAMPLERS[sampler.name].options, source)
    pruner = PrunerSpec(**_split_name(section.pruner, "pruner", source))
    check_name("pruner", pruner.name, PRUNERS, source)
    check_options("pruner", pruner, PRUNERS[pruner.name].options, source)
    parameters = {
        key: _parse_parameter(key, written, source) for key, written in section.parameters.items()
    }
    space = SearchSpace(
        **shared,
        trials=section.trials,
        cohort_size=section.cohort_size,
        sampler=sampler,
        pruner=pruner,
        parameters=in_order(parameters, source),
        points=tuple(section.points),
    )
    check_space(space, source, after_probes=after_probes)
    return space


def _goals(section: SpaceSection | TwoPartSection, source: Source) -> dict[str, Any]:
    """What trials are compared by: `objective`, `minimised` and `constraints` of a space."""
    first, *costs = section.objectives or [section.objective]
    if section.objectives and "objective" in section.model_fields_set:
        raise source.error("it is given beside objective", "objectives", hint="write one of them")
    if first not in SCORES:
        hint = f"the first is the metric to maximise: {', '.join(SCORES)}"
        raise source.error(f"{first!r} is no metric of validation", "objectives", 0, hint=hint)
    for place, name in enumerate(costs, 1):
        if name not in COSTS:
            raise source.unknown("cost", name, COSTS, "objectives", place)
        if name in costs[: place - 1]:
            raise source.error(f"{name!r} is there twice", "objectives", place)
    constraints = validated(ConstraintsSection, section.constraints, source, "constraints")
    return {
        "objective": first,
        "minimised": tuple(costs),
        "constraints": constraints.bounds(),
    }


def coerce_value(name: str, value: Any) -> Value:
    """`value` in the type of the trial setting `name`, or InputError."""
    coerced: Value = coerce(name, FIELDS[name], value)
    return coerced


def _split_name(written: Any, key: str, source: Source) -> dict[str, Any]:
    """`tpe` or `{name: tpe, startup_trials: 32}` as name and options."""
    if isinstance(written, dict) and "name" not in written:
        raise source.error("its name is missing", key, hint=f"write `{key}: {{name: ..., ...}}`")
    options = dict(written) if isinstance(written, dict) else {"name": written}
    name = options.pop("name")
    if not isinstance(name, str):
        raise source.error(f"expected a name, but got {name!r}", key)
    return {"name": name, "options": options}


def _parse_parameter(name: str, written: Any, source: Source) -> Parameter:
    """A parameter from a scalar, a list of values, a mapping, or a list of such mappings."""
    path = ("parameters", name)
    if name == "mode":
        hint = "the part says it" if source.part else "write `mode:` at the top"
        raise source.error("mode is for all trials", *path, hint=hint)
    if name not in FIELDS:
        raise source.unknown("parameter", name, FIELDS.keys() - {"mode"}, *path)
    if isinstance(written, list) and written and all(isinstance(w, dict) for w in written):
        parsed = [_parse_branch(name, w, source, *path, i) for i, w in enumerate(written)]
        if len(parsed) > 1:
            branches = tuple(
                Branch(key=branch_key(name, when), when=when, domain=domain)
                for when, domain in parsed
            )
            return Parameter(name=name, branches=branches)
    elif isinstance(written, dict):
        parsed = [_parse_branch(name, written, source, *path)]
    elif isinstance(written, list):
        if FIELDS[name].startswith("tuple") and not all(isinstance(w, list) for w in written):
            raise source.error(
                f"{written!r} may mean one value or several",
                *path,
                hint=f"write {{constant: {written!r}}} or {{choice: [{written!r}]}}",
            )
        parsed = [({}, _choice(name, written, source, *path))]
    else:
        parsed = [({}, Constant(value=_value(name, written, source, *path)))]
    when, domain = parsed[0]
    return Parameter(name=name, branches=(Branch(key=name, when=when, domain=domain),))


def _parse_branch(
    name: str, written: dict[str, Any], source: Source, *path: str | int
) -> tuple[dict[str, tuple[Value, ...]], Domain]:
    """The condition and the domain of one mapping."""
    if "choice" in written:
        choice = validated(ChoiceSection, written, source, *path)
        domain = _choice(name, choice.choice, source, *path, "choice")
        return _parse_when(choice.when, source, *path), domain
    if "constant" in written:
        constant = validated(ConstantSection, written, source, *path)
        value = _value(name, constant.constant, source, *path, "constant")
        return _parse_when(constant.when, source, *path), Constant(value=value)
    if not written.keys() & {"low", "high"}:
        raise source.error(
            f"expected a choice, a range or a constant, but got {written!r}",
            *path,
            hint="write {choice: [...]}, {low: ..., high: ...} or {constant: ...}",
        )
    section = validated(RangeSection, written, source, *path)
    return _parse_when(section.when, source, *path), _range(name, section, source, *path)


def _choice(name: str, written: list[Any], source: Source, *path: str | int) -> Choice:
    if not written:
        raise source.error("there is nothing to choose from", *path, hint="list some values")
    options = tuple(_value(name, value, source, *path, i) for i, value in enumerate(written))
    for i, option in enumerate(options):
        if option in options[:i]:
            raise source.error(f"{plain(option)!r} is there twice", *path, i)
    return Choice(options=options)


def _range(name: str, section: RangeSection, source: Source, *path: str | int) -> Range:
    kind = FIELDS[name]
    if kind not in NUMBERS:
        raise source.error(f"{name} is not a number", *path, hint="write {choice: [...]}")
    low, high = (_value(name, getattr(section, k), source, *path, k) for k in ("low", "high"))
    assert isinstance(low, (int, float)) and isinstance(high, (int, float))
    if low > high:
        raise source.error(f"low <= high must hold, but got {low=}, {high=}", *path, "low")
    if section.log and low <= 0:
        raise source.error(f"a log range starts above 0, but got {low=}", *path, "low")
    step = section.step
    if step is None:
        return Range(low=low, high=high, log=section.log, whole=not kind.startswith("float"))
    if section.log:
        raise source.error("a log range has no step", *path, "step")
    _value(name, step, source, *path, "step")
    if (high - low) / step > MAX_STEPS:
        raise source.error(
            f"that is more than {MAX_STEPS:,} steps", *path, "step", hint="leave the step out"
        )
    stepped = Range(low=low, high=high, step=step, whole=not kind.startswith("float"))
    if not stepped.contains(high):
        raise source.error(
            f"steps of {step:g} from {low:g} do not end at {high:g}",
            *path,
            "high",
            hint=f"write high: {(stepped.values() or [low])[-1]}",
        )
    return stepped


def _parse_when(
    written: dict[str, Any], source: Source, *path: str | int
) -> dict[str, tuple[Value, ...]]:
    """A condition: parameter -> the values that meet it. Whether they exist is checked later."""
    when: dict[str, tuple[Value, ...]] = {}
    for name, valid in written.items():
        if name not in FIELDS:
            raise source.unknown("parameter", name, FIELDS, *path, "when", name)
        several = isinstance(valid, list)
        if several and FIELDS[name].startswith("tuple"):
            several = all(isinstance(v, list) for v in valid)
        items = valid if several else [valid]
        if not items:
            raise source.error("no value meets an empty list", *path, "when", name)
        when[name] = tuple(_value(name, v, source, *path, "when", name) for v in items)
    return when


def _value(name: str, value: Any, source: Source, *path: str | int) -> Value:
    try:
        return coerce_value(name, value)
    except InputError as error:
        raise source.error(error.problem, *path, hint=error.hint) from error
