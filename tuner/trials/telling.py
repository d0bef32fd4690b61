"""A trial's end as Optuna hears it: its state, its value or values, what it violates.

Ray's own OptunaSearch tells stopped trials as COMPLETE, which misleads the sampler. Here a stopped
trial is PRUNED, one that broke is FAIL, and one that violates a constraint carries by how much:
samplers learn from that, where they would forget a failed one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.report import Outcome, Status

from ..goals.constraints import violations
from ..studies.study import OUTCOME, outcome_attribute

if TYPE_CHECKING:
    import optuna

    from ..spaces.space import SearchSpace

FITS = "fits_in_memory"
"""Optuna's constraint, above 0 where it is violated. Trials without it count as feasible."""


def tell(
    study: optuna.Study, trial: optuna.Trial, outcome: Outcome, space: SearchSpace | None = None
) -> None:
    """Tell Optuna a trial's end, with the rest of the outcome as an attribute.

    An infeasible trial that was trained to its end has its values, as others have; one that was
    stopped before its first epoch is PRUNED. `space` says which costs are objectives and which
    constraints there are; None: there are neither.
    """
    from optuna.trial import TrialState

    trial.set_user_attr(OUTCOME, outcome_attribute(outcome))
    _set_constraints(trial, outcome, space)
    match outcome.status:
        case Status.COMPLETE | Status.INFEASIBLE if outcome.best_value is not None:
            costs = () if space is None else space.minimised
            study.tell(trial, [outcome.best_value, *(outcome.best_metrics[c] for c in costs)])
        case Status.PRUNED | Status.INFEASIBLE:
            study.tell(trial, state=TrialState.PRUNED)
        case Status.FAILED:
            study.tell(trial, state=TrialState.FAIL)
        case Status.COMPLETE:
            raise ValueError(f"a complete trial has a value, but trial {trial.number} has none")


def _set_constraints(trial: optuna.Trial, outcome: Outcome, space: SearchSpace | None) -> None:
    """All constraints of the space that are known of the trial, kept or not: the Gaussian process
    wants the same ones of every complete trial."""
    found = {} if space is None else violations(space.constraints, outcome.best_metrics)
    if outcome.status is Status.INFEASIBLE and not any(share > 0 for share in found.values()):
        found = found | {FITS: 1.0}
    for name, share in found.items():
        # A kill may have come between here and the end, hence the question.
        if name not in trial.constraints:
            trial.set_constraint(name, share)
