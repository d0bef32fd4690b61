"""From a point that a person wrote, or an earlier trial, to what Optuna enqueues.

A point may be given in part: what it leaves out, the sampler chooses. Then a setting whose
existence hangs on a left-out one cannot be placed, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.errors import InputError

from .domain import Branch, Constant, Parameter, Range, Value, encode, plain
from .file import coerce_value
from .source import Source


def point_to_params(
    point: Mapping[str, Any], *, mode: str, parameters: Mapping[str, Parameter]
) -> dict[str, Any]:
    """`point`, some or all settings of a trial, as parameters for `study.enqueue_trial`.

    Raises InputError, with the setting's name as its place, for a setting that is no part of the
    space, does not exist beside the others, or is out of its range.
    """
    params: dict[str, Any] = {}
    values: dict[str, Value] = {"mode": mode}
    left_out: set[str] = set()
    valid = {"mode": mode, **parameters}
    for name in point:
        if name not in valid:
            raise Source(name=name).unknown("parameter", name, valid)
    if point.get("mode", mode) != mode:
        raise InputError(f"it is for mode {mode!r}, not {point['mode']!r}", where="mode")
    for parameter in parameters.values():
        name = parameter.name
        branch, unknown = _decide(parameter, values, left_out)
        if name not in point:
            if branch is not None and isinstance(branch.domain, Constant):
                values[name] = branch.domain.value
            elif branch is not None or unknown:
                left_out.add(name)
            continue
        if branch is None:
            raise _does_not_apply(parameter, unknown)
        value = coerce_value(name, point[name])
        if not branch.domain.contains(value):
            raise InputError(f"{plain(value)!r} is outside {branch.domain.to_dict()}", where=name)
        if isinstance(branch.domain, Range):
            value = branch.domain.nearest(value)  # type: ignore[arg-type]
        values[name] = value
        if not isinstance(branch.domain, Constant):
            params[branch.key] = encode(value)
    return params


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a space can hold of a trial that was made in another one."""

    point: dict[str, Any]
    """The settings that a point of the space can hold."""
    refused: tuple[str, ...]
    """Settings that the space searches, elsewhere than where the trial's value lies."""
    fixed: tuple[str, ...]
    """Settings that the space lacks, holds constant at another value, or does not have beside the
    others."""


def fit_settings(
    settings: Mapping[str, Any], *, mode: str, parameters: Mapping[str, Parameter]
) -> Fit:
    """The part of a trial's `settings`, made in another space, that a point of this one can hold.

    What is left out takes along the settings whose existence hangs on it.
    """
    point: dict[str, Any] = {}
    values: dict[str, Value] = {"mode": mode}
    chosen_later: set[str] = set()
    refused: list[str] = []
    fixed = [name for name in settings if name not in parameters]
    for parameter in parameters.values():
        name = parameter.name
        branch, unknown = _decide(parameter, values, chosen_later)
        if branch is not None and name in settings:
            value = coerce_value(name, settings[name])
            if branch.domain.contains(value):
                point[name] = plain(value)
                values[name] = value
                continue
        is_constant = branch is not None and isinstance(branch.domain, Constant)
        if name in settings:
            (fixed if branch is None or is_constant else refused).append(name)
        if branch is not None and isinstance(branch.domain, Constant):
            values[name] = branch.domain.value
        elif branch is not None or unknown:
            chosen_later.add(name)
    return Fit(point=point, refused=tuple(refused), fixed=tuple(fixed))


def fitting_point(
    settings: Mapping[str, Any], *, mode: str, parameters: Mapping[str, Parameter]
) -> tuple[dict[str, Any], list[str]]:
    """`fit_settings` as the point and the names of all settings that it cannot hold: the sampler
    chooses them, if the space has them."""
    fit = fit_settings(settings, mode=mode, parameters=parameters)
    left_out = [*fit.refused, *fit.fixed]
    return fit.point, [name for name in settings if name in left_out]


def _decide(
    parameter: Parameter, values: Mapping[str, Value], left_out: set[str]
) -> tuple[Branch | None, list[str]]:
    """The branch that exists beside `values`, or None and the left-out parents it hangs on."""
    for branch in parameter.branches:
        unknown = [name for name in branch.when if name in left_out]
        known = {name: valid for name, valid in branch.when.items() if name not in left_out}
        if replace(branch, when=known).holds(values):
            return (None, unknown) if unknown else (branch, [])
    return None, []


def _does_not_apply(parameter: Parameter, unknown: list[str]) -> InputError:
    """Why a setting of a point has no branch."""
    needs = " or ".join(
        " and ".join(f"{name} in {[plain(v) for v in valid]}" for name, valid in b.when.items())
        for b in parameter.branches
        if b.when
    )
    problem = (
        f"it needs {' and '.join(unknown)} to be given too"
        if unknown
        else "it does not exist beside the other settings"
    )
    return InputError(problem, where=parameter.name, hint=f"it depends on {needs}")
