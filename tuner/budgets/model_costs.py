"""What the costs of models mean for a quote: the time to measure them, and trials that are refused.

A configuration whose cost violates a constraint ends without training. Which do is known once a
study has measured them, and before that from what earlier studies of this home measured on the
same device; where nobody has, every trial is counted as trained, and that is said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from core.config import TrialConfig

from ..goals.constraints import why_not
from ..goals.costs import COSTS, Costs, Shape, shape_of, shapes_of
from ..goals.judge import Judge
from ..spaces.space import SearchSpace
from .calibration import NOTHING, Calibration, Estimate, Line, Note, within

MEASURING = Line(fixed=8.0, slope=1.0, factor=3.0)
"""Number of kinds of models -> seconds, where no study has shown it: a worker starts, too."""
ALL = within(1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class CostsAhead:
    """What a part's costs will do."""

    num_unmeasured: int = 0
    """Kinds of models still to be measured."""
    kept: Estimate = ALL
    """Share of the trials that is trained; `high` is all, as samplers learn what is refused."""
    known: bool = True
    """Whether it is known what is refused."""
    judge: Judge | None = None
    """By the costs that are expected; None where not all are known, or nothing is bounded."""


def costs_ahead(
    space: SearchSpace,
    configs: Sequence[TrialConfig],
    measured: Mapping[Shape, Costs],
    device: str,
    calibration: Calibration,
    *,
    before: Collection[Shape] = (),
) -> CostsAhead:
    """What lies ahead of a part with these `configs`, drawn from its space.

    Args:
        measured: what its study has measured already.
        device: `tuner.budgets.speeds.device_name` of the workers that measure.
        before: what the part before this one measures, or has.
    """
    if not space.costs:
        return CostsAhead()
    shapes = shapes_of(space)
    num_unmeasured = sum(shape not in measured and shape not in before for shape in shapes)
    if not any(name in COSTS for name in space.constraints):
        return CostsAhead(num_unmeasured=num_unmeasured)
    expected = {shape: _expected(shape, measured, device, calibration) for shape in shapes}
    found = {shape: costs for shape, costs in expected.items() if costs is not None}
    if len(found) < len(shapes) or not configs:
        return CostsAhead(num_unmeasured=num_unmeasured, known=False)
    middle = {
        shape: {name: cost.value for name, cost in own.items()} for shape, own in found.items()
    }
    worst = {shape: {name: cost.high for name, cost in own.items()} for shape, own in found.items()}
    return CostsAhead(
        num_unmeasured=num_unmeasured,
        kept=Estimate(
            low=_share(space, configs, worst), value=_share(space, configs, middle), high=1.0
        ),
        judge=Judge(bounds=space.constraints, costs=middle),
    )


def trained(configs: Sequence[TrialConfig], ahead: CostsAhead) -> tuple[TrialConfig, ...]:
    """Those of the drawn configurations that are expected to be trained; all of them where it is
    not known, or none is."""
    if ahead.judge is None:
        return tuple(configs)
    kept = tuple(config for config in configs if ahead.judge.refused(config) is None)
    return kept or tuple(configs)


def measuring_seconds(ahead: CostsAhead, device: str, calibration: Calibration) -> Estimate:
    """Of one worker, for the kinds of models that are still to be measured."""
    if not ahead.num_unmeasured:
        return NOTHING
    return (calibration.line(costs_key(device)) or MEASURING)(ahead.num_unmeasured)


def notes_of_costs(device: str, costs: Mapping[Shape, Costs], seconds: float) -> list[Note]:
    """What a measurement teaches: the time it took, and what it found."""
    notes: list[Note] = [(costs_key(device), (float(len(costs)), seconds))]
    for shape, own in costs.items():
        notes += [(shape_key(device, name, shape), own[name]) for name in COSTS]
    return notes


def costs_key(device: str) -> str:
    """Line: kinds of models -> the seconds in which their costs were measured."""
    return f"costs/{device}"


def shape_key(device: str, cost: str, shape: Shape) -> str:
    """A cost of a kind of model."""
    hidden = "-".join(map(str, shape.hidden_sizes))
    parts = (shape.backbone, shape.image_size, shape.head, hidden, shape.pooling, shape.blocks)
    return f"{cost}/{device}/{' '.join(map(str, parts))}"


def _expected(
    shape: Shape, measured: Mapping[Shape, Costs], device: str, calibration: Calibration
) -> dict[str, Estimate] | None:
    """The costs of a kind of model; None if one of them is not known."""
    if shape in measured:
        return {name: within(measured[shape][name], 1.0) for name in COSTS}
    found = {name: calibration.number(shape_key(device, name, shape)) for name in COSTS}
    known = {name: cost for name, cost in found.items() if cost is not None}
    return known if len(known) == len(COSTS) else None


def _share(
    space: SearchSpace, configs: Sequence[TrialConfig], costs: Mapping[Shape, Costs]
) -> float:
    kept = [not why_not(space.constraints, costs[shape_of(config)]) for config in configs]
    return sum(kept) / len(kept)
