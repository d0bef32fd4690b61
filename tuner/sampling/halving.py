"""Successive halving for trials that reach a rung together.

Optuna's own pruner judges a trial against those that were judged before it, so of a cohort that
arrives at once the first always passes. Here all values of a cohort are reported before any trial
is judged, and a trial passes if it is among the best 1/reduction_factor of all that ever reached
the rung (in this study, from whatever machine), and at least one passes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial


class RungPruner(BasePruner):
    """Stops a trial at a rung unless its value is among the best there.

    Args:
        rungs: epochs (Optuna's steps) at which trials are compared.
        reduction_factor: one in this many passes, >= 2.
    """

    def __init__(self, *, rungs: Sequence[int], reduction_factor: int) -> None:
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor >= 2 must hold, but got {reduction_factor=}")
        self._reduction_factor = reduction_factor
        # What trials reached that ended is final: ascending by rung, so that a long study is not
        # gone through again for every trial.
        self._ended: dict[int, list[float]] = {rung: [] for rung in rungs}
        self._num_ended = 0

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial stops at its last reported step. Higher values are better."""
        step = trial.last_step
        if step is None or step not in self._ended:
            return False
        others = self._not_ended(study.get_trials(deepcopy=False))
        ended = self._ended[step]
        values = [o.intermediate_values[step] for o in others if step in o.intermediate_values]
        value = trial.intermediate_values[step]
        better = len(ended) - bisect.bisect_right(ended, value) + sum(v > value for v in values)
        passing = max(1, (len(ended) + len(values)) // self._reduction_factor)
        return better >= passing

    def _not_ended(self, trials: Sequence[FrozenTrial]) -> Iterable[FrozenTrial]:
        """Files the values of the leading trials that ended since; the trials after those."""
        while self._num_ended < len(trials) and trials[self._num_ended].state.is_finished():
            for step, value in trials[self._num_ended].intermediate_values.items():
                if step in self._ended:
                    bisect.insort(self._ended[step], value)
            self._num_ended += 1
        return trials[self._num_ended :]
