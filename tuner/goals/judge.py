"""What a study's trials cost and whether they may win, before they are trained and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.config import TrialConfig
from core.errors import InputError
from core.report import Outcome, Status

from ..studies.plan import READ_BY_FEATURES, Plan, requests_of
from .constraints import judged, why_not
from .costs import (
    COSTS,
    SETTINGS,
    Costs,
    Shape,
    measured_costs,
    shape_of,
    shape_of_values,
    shapes_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..spaces.space import SearchSpace
    from ..studies.study import Study
    from ..trials.cluster import Workers
    from ..trials.context import Context


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The bounds of a study, and what each shape of its models costs."""

    bounds: Mapping[str, float] = field(default_factory=dict)
    """The space's constraints."""
    costs: Mapping[Shape, Costs] = field(default_factory=dict)
    """Empty where no trial is judged by its cost."""

    def costs_of(self, config: TrialConfig) -> Costs:
        """Empty where costs do not count."""
        return self.costs[shape_of(config)] if self.costs else {}

    def refused(self, config: TrialConfig) -> Outcome | None:
        """The end of a trial whose cost violates a constraint; None for one that may be trained."""
        costs = self.costs_of(config)
        reason = why_not(self.bounds, costs)
        if not reason:
            return None
        return Outcome(status=Status.INFEASIBLE, reason=reason, best_metrics=dict(costs))

    def ended(self, config: TrialConfig, outcome: Outcome) -> Outcome:
        """The outcome with the trial's costs among its metrics, infeasible if it is complete and
        violates a constraint."""
        metrics = {**outcome.best_metrics, **self.costs_of(config)}
        return judged(self.bounds, dataclasses.replace(outcome, best_metrics=metrics))


ANYTHING_GOES = Judge()
"""Of a study of one objective without constraints."""


def judge_of(
    study: Study, space: SearchSpace, context: Context, workers: Workers, console: Console
) -> Judge:
    """The judge of a study; costs that are not known yet are measured now, on Ray.

    Raises InputError if no configuration of the space keeps the constraints.
    """
    if not space.costs:
        return Judge(bounds=space.constraints)
    costs = measured_costs(study.optuna(), shapes_of(space), context, workers, console)
    _require_some(space, costs)
    return Judge(bounds=space.constraints, costs=costs)


def affordable(plan: Plan, space: SearchSpace, judge: Judge) -> Plan:
    """The plan without features that only trials would read whose cost violates a constraint."""
    if not judge.costs:
        return plan
    read = {
        request
        for values in space.assignments({*READ_BY_FEATURES, *SETTINGS})
        if not why_not(judge.bounds, judge.costs[shape_of_values(values)])
        for request in requests_of(space, values)
    }
    return dataclasses.replace(plan, requests=tuple(r for r in plan.requests if r in read))


def _require_some(space: SearchSpace, costs: Mapping[Shape, Costs]) -> None:
    """At least one shape keeps all bounds on costs."""
    if any(not why_not(space.constraints, own) for own in costs.values()):
        return
    least = {name: min(own[name] for own in costs.values()) for name in COSTS}
    bounded = [name for name in space.constraints if name in COSTS]
    numbers = ", ".join(f"{name} {least[name]:g} {COSTS[name]}" for name in bounded)
    raise InputError(
        f"no configuration keeps them: the least that was measured is {numbers}",
        where=f"space {space.name}, constraints",
        hint="raise the bounds, or add smaller backbones or picture sizes",
    )
