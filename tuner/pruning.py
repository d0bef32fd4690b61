"""Successive halving for trials that reach a rung together.

Optuna's own pruner judges a trial against those that were judged before it, so of a cohort that
arrives at once the first always passes. Here all values of a cohort are reported before any trial
is judged, and a trial passes if it is among the best 1/reduction_factor of all that ever reached
the rung (in this study, from whatever machine), and at least one passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.pruners import BasePruner


class RungPruner(BasePruner):
    """Stops a trial at a rung unless its value is among the best there.

    Args:
        rungs: epochs (Optuna's steps) at which trials are compared.
        reduction_factor: one in this many passes, >= 2.
    """

    def __init__(self, *, rungs: Sequence[int], reduction_factor: int) -> None:
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor >= 2 must hold, but got {reduction_factor=}")
        self._rungs = frozenset(rungs)
        self._reduction_factor = reduction_factor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial stops at its last reported step. Higher values are better."""
        step = trial.last_step
        if step is None or step not in self._rungs:
            return False
        values = sorted(
            (
                other.intermediate_values[step]
                for other in study.get_trials(deepcopy=False)
                if step in other.intermediate_values
            ),
            reverse=True,
        )
        passing = max(1, len(values) // self._reduction_factor)
        return trial.intermediate_values[step] < values[passing - 1]
