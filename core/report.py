"""The seam between training and whoever watches: reports out, stops in, an outcome at the end."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Metrics = Mapping[str, float]


class Report(Protocol):
    """Called once an epoch by the training of one trial; answers whether to stop now.

    In tests it is a list's append; on a cluster it is the study's pruner and Ray Train's report.
    """

    def __call__(self, epoch: int, metrics: Metrics) -> bool:
        """`epoch` counts from 1; `metrics` are finite numbers. True: stop after this epoch."""
        ...


class CohortReport(Protocol):
    """`Report` for trials that train together: all of an epoch at once, so that a pruner sees
    each trial beside the others."""

    def __call__(self, epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        """`metrics` by the trial's place in the cohort; answers the places that are to stop."""
        ...


def keep_going(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
    """The report of a cohort that nobody watches."""
    return ()


class Status(enum.StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    INFEASIBLE = "infeasible"
    """Its settings cannot run on this machine, such as a batch that exceeds its memory."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training one trial came to."""

    status: Status
    reason: str = ""
    """Why it was pruned or failed; empty for a complete trial."""
    curve: tuple[dict[str, float], ...] = ()
    """Metrics of each epoch, first to last."""
    best_epoch: int | None = None
    """Epoch (from 1) of the best objective, the earliest of equals; None if there was none."""
    best_value: float | None = None
    """The objective at `best_epoch`: the trial's value."""
    best_metrics: dict[str, float] = field(default_factory=dict)
    """Further validation metrics at `best_epoch`."""
    seconds: float = 0.0
    """Device time it used; trials of a stack share its time evenly."""
    ended: float = 0.0
    """Unix time at which the study heard of it; set by whoever keeps the study."""
    state: dict[str, Tensor] | None = None
    """The weights at `best_epoch`, on the CPU, where they were asked for."""
