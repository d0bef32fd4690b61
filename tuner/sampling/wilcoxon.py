"""Pruning by folds: a trial stops when it is worse than the best one, fold by fold.

Optuna's WilcoxonPruner pairs the values of one trial with the best trial's by step, and means a
step to be an instance of the problem. Here an instance is a fold, but all folds of a head train
side by side, and steps are epochs. So at a rung a trial's values on the folds are kept with it
(`fold_values`), and Optuna's own pruner is shown two trials whose steps are the folds then. What
the study holds besides stays as for any pruner: epochs, and the mean over the folds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import optuna
from optuna.pruners import BasePruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.errors import InputError

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace


def fold_values(epoch: int) -> str:
    """The user attribute of a trial that holds its values on the folds after `epoch`."""
    return f"fold_values:{epoch}"


class FoldPruner(BasePruner):
    """Stops a trial at a rung if a signed-rank test says that it is worse than the best complete
    trial was at that epoch, over the folds. Nothing is stopped before a trial is complete, nor
    where the folds' values are not known.

    Args:
        p_threshold: stops below this p-value of the one-sided test, 0 < p < 1. Each rung is a test
            of its own, so that a trial as good as the best is stopped somewhat more often.
    """

    def __init__(self, *, p_threshold: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._pruner = WilcoxonPruner(p_threshold=p_threshold, n_startup_steps=2)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        values = None if step is None else trial.user_attrs.get(fold_values(step))
        best = _best(study)
        if step is None or values is None or best is None:
            return False
        of_best = best.user_attrs.get(fold_values(step))
        if of_best is None or len(of_best) != len(values):
            return False
        pair = optuna.create_study(direction=study.direction)
        pair.add_trial(_by_fold(of_best, TrialState.COMPLETE))
        return self._pruner.prune(pair, _by_fold(values, TrialState.RUNNING))


def check_folds(space: SearchSpace, num_folds: int | None) -> None:
    """Raises InputError where a pruner that compares folds could never stop a trial."""
    if space.pruner.name != "wilcoxon":
        return
    where, folds = f"{space.name}, pruner: wilcoxon", num_folds or 1
    if folds < 2:
        raise InputError(
            "it compares trials fold by fold, and there is one validation part",
            where=where,
            hint="search with --folds 5, or take another pruner",
        )
    from .options import check_options
    from .pruners import PRUNERS, WilcoxonOptions

    options = check_options("pruner", space.pruner, PRUNERS["wilcoxon"].options)
    assert isinstance(options, WilcoxonOptions)
    lowest = 0.5**folds
    if lowest >= options.p_threshold:
        raise InputError(
            f"the test over {folds} folds cannot fall below {lowest:g}, so that p_threshold "
            f"{options.p_threshold:g} never stops a trial",
            where=where,
            hint=f"more --folds, or {{name: wilcoxon, p_threshold: {1.2 * lowest:.2g}}}",
        )


def _best(study: optuna.Study) -> FrozenTrial | None:
    try:
        return study.best_trial
    except ValueError:  # Optuna's word for: no trial is complete yet.
        return None


def _by_fold(values: Sequence[float], state: TrialState) -> FrozenTrial:
    """A trial whose steps are folds."""
    mean = sum(values) / len(values)
    return create_trial(
        state=state,
        value=mean if state == TrialState.COMPLETE else None,
        intermediate_values=dict(enumerate(values)),
    )
