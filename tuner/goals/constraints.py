"""What a model must keep to win: bounds on its cost and on its weakest class.

Bounds on cost are checked before a trial is trained (`tuner.goals.costs` measures them), the bound
on recall when it is complete. A trial that violates one is infeasible: it stays visible with its
reason, cannot win, and Optuna hears by what share of the bound it is violated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from core.errors import InputError

if TYPE_CHECKING:
    from core.data.split import Split
    from core.data.table import Table
    from core.report import Outcome

    from ..finalists.crown import FinalistOptions
    from ..spaces.space import SearchSpace

RECALL = "validation_worst_class_recall"
"""Of `core.probing.probe.further_metrics`."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound that a space can set."""

    metric: str
    """What is bounded, among a trial's metrics."""
    upper: bool
    """Whether the bound is the most there may be, or the least."""
    text: str
    """The metric for people, with a place for its value."""

    def violation(self, value: float, bound: float) -> float:
        """By what share of the bound it is violated; at most 0 where it is kept. Shares, as
        samplers add up the violations of several constraints."""
        return (value - bound if self.upper else bound - value) / bound


LIMITS: dict[str, Limit] = {
    "latency_ms": Limit(metric="latency_ms", upper=True, text="one picture takes {:.1f} ms"),
    "size_mb": Limit(metric="size_mb", upper=True, text="its model takes {:.1f} MB"),
    "min_class_recall": Limit(
        metric=RECALL, upper=False, text="its worst class has a recall of {:.3f}"
    ),
}


class ConstraintsSection(BaseModel):
    """What a model must keep to win."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    latency_ms: float | None = Field(
        default=None, gt=0, description="Most milliseconds that predicting one picture may take, "
        "measured on the device of the study."
    )  # fmt: skip
    size_mb: float | None = Field(
        default=None, gt=0, description="Most megabytes that the saved model may take."
    )
    min_class_recall: float | None = Field(
        default=None, gt=0, lt=1, description="Least recall at three, on validation, of the worst "
        "class among those with at least 10 validation pictures."
    )  # fmt: skip

    def bounds(self) -> dict[str, float]:
        """Those that are set, by name."""
        return self.model_dump(exclude_none=True)


NO_BOUNDS: Mapping[str, float] = {}


def goals_text(space: SearchSpace) -> str:
    """For people: what trials are compared by; empty for one objective without constraints."""
    goals = [f"highest {space.objective}", *(f"lowest {name}" for name in space.minimised)]
    bounds = [
        f"{name} {'at most' if LIMITS[name].upper else 'at least'} {bound:g}"
        for name, bound in space.constraints.items()
    ]
    if not space.minimised and not bounds:
        return ""
    return ", ".join(goals) + (f"; {', '.join(bounds)}" if bounds else "")


def violations(bounds: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """The violation of each constraint whose metric is known, above 0 where it is not kept."""
    return {
        name: LIMITS[name].violation(metrics[LIMITS[name].metric], bound)
        for name, bound in bounds.items()
        if LIMITS[name].metric in metrics
    }


def why_not(bounds: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    """Which constraints are violated, for people; empty if all that are known are kept."""
    reasons = []
    for name, share in violations(bounds, metrics).items():
        if share > 0:
            limit = LIMITS[name]
            reasons.append(
                f"{limit.text.format(metrics[limit.metric])}, and {name} is {bounds[name]:g}"
            )
    return "; ".join(reasons)


def judged(bounds: Mapping[str, float], outcome: Outcome) -> Outcome:
    """The outcome of a trial, infeasible if it is complete and violates a constraint.

    Raises KeyError if a complete trial lacks a metric that is bounded.
    """
    from core.report import Status

    if outcome.status is not Status.COMPLETE:
        return outcome
    for name in bounds:
        outcome.best_metrics[LIMITS[name].metric]
    reason = why_not(bounds, outcome.best_metrics)
    if not reason:
        return outcome
    return dataclasses.replace(outcome, status=Status.INFEASIBLE, reason=reason)


def check_judgeable(
    space: SearchSpace, table: Table, split: Split, finalists: FinalistOptions
) -> None:
    """Raises InputError for constraints that nothing could be judged by, on this table and with
    these wishes for the end."""
    bounds: dict[str, Any] = {}
    for part in space.parts:
        bounds |= part.constraints
    where = f"space {space.name}, constraints"
    if bounds and finalists.ensemble is not None:
        raise InputError(
            "an ensemble is several models, and trials are judged one by one",
            where=f"--ensemble, beside {where}",
            hint="leave out --ensemble, or the constraints",
        )
    if "min_class_recall" in bounds:
        from core.metrics import JUDGED_POSITIVES

        for _, rows in split.pairs():
            most = int(table.targets_NC[rows].sum(0).max())
            if most < JUDGED_POSITIVES:
                raise InputError(
                    f"no class has {JUDGED_POSITIVES} of the {len(rows)} validation pictures: the "
                    f"commonest has {most}",
                    where=f"{where}.min_class_recall",
                    hint="it takes more pictures or fewer folds; or leave it out",
                )
