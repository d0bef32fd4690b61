"""Stopping trials of a study with several objectives.

Optuna's `report` and `should_prune` refuse such studies. By the first objective alone small, quick
models would be stopped although they belong to the front. So a rung ranks trials by fronts: the
value reached there beside the costs, which are known before training. Multi-objective successive
halving (Schmucker et al. 2021, arXiv:2106.12639) with all costs known; within a front the better
value passes first, where the paper spreads points over the front.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from ..goals.costs import ATTRIBUTE
from ..goals.pareto import layers

RUNG = "rung:"
"""Optuna user attribute of a trial, followed by an epoch: the value it reached there. In studies
of one objective that is an intermediate value."""


def report(trial: optuna.Trial, value: float, epoch: int) -> None:
    """`Trial.report`, for any number of objectives."""
    if len(trial.study.directions) == 1:
        trial.report(value, epoch)
    else:
        trial.set_user_attr(f"{RUNG}{epoch}", value)


def should_stop(trial: optuna.Trial) -> bool:
    """`Trial.should_prune`, for any number of objectives."""
    study = trial.study
    if len(study.directions) == 1:
        return trial.should_prune()
    return study.pruner.prune(study, study.get_trials(deepcopy=False)[trial.number])


def reported(trial: FrozenTrial) -> dict[int, float]:
    """Epoch -> value, of all that `report` was told of a trial."""
    noted = {
        int(name.removeprefix(RUNG)): float(value)
        for name, value in trial.user_attrs.items()
        if name.startswith(RUNG)
    }
    return noted | trial.intermediate_values


class FrontPruner(BasePruner):
    """Stops a trial at a rung unless it is among the best there, by fronts.

    Args:
        rungs: epochs at which trials are compared.
        reduction_factor: one in this many passes, >= 2; at least one does.
        costs: names of the objectives that are minimised.
    """

    def __init__(
        self, *, rungs: Sequence[int], reduction_factor: int, costs: Sequence[str]
    ) -> None:
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor >= 2 must hold, but got {reduction_factor=}")
        self._rungs = frozenset(rungs)
        self._reduction_factor = reduction_factor
        self._costs = tuple(costs)
        # A cohort reports together and is judged one by one: the same ranking for all of it.
        self._points: list[tuple[float, ...]] = []
        self._layers: list[int] = []

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial stops at the last rung that it reported."""
        own = reported(trial)
        if not own or max(own) not in self._rungs:
            return False
        epoch = max(own)
        numbers, points = [], []
        for other in study.get_trials(deepcopy=False):
            value = other.user_attrs.get(f"{RUNG}{epoch}")
            if value is not None:
                costs = other.user_attrs[ATTRIBUTE]
                numbers.append(other.number)
                points.append((value, *(-costs[name] for name in self._costs)))
        passing = max(1, len(points) // self._reduction_factor)
        if points != self._points:
            self._points, self._layers = points, layers(points, enough=passing)
        ranks = [(layer, -point[0]) for layer, point in zip(self._layers, points, strict=True)]
        place = ranks[numbers.index(trial.number)]
        return sum(rank < place for rank in ranks) >= passing
