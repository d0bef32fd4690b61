"""Trials under constraints as a Gaussian process can take them.

Optuna's knows complete trials only, and wants the same constraints of each. So a trial that was
refused before it was trained is shown to it with the worst value of all others (which it does not
count, as the trial is infeasible), and a constraint that nobody knows of a trial counts as just
kept. What the study itself holds stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial


def with_refused(trials: Sequence[FrozenTrial], study: optuna.Study) -> list[FrozenTrial]:
    """Ended trials, those that were refused made complete; those pruned by score are left out."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if not complete:
        return []
    names = {name: 0.0 for trial in trials for name in trial.constraints}
    return [
        create_trial(
            values=trial.values if trial.state == TrialState.COMPLETE else worst(complete, study),
            params=trial.params,
            distributions=trial.distributions,
            constraints=names | trial.constraints,
        )
        for trial in trials
        if trial.state == TrialState.COMPLETE or is_refused(trial)
    ]


def is_refused(trial: FrozenTrial) -> bool:
    """Whether it violates a constraint and has no value."""
    return not trial.values and any(share > 0 for share in trial.constraints.values())


def worst(complete: Sequence[FrozenTrial], study: optuna.Study) -> list[float]:
    """The worst value of each objective."""
    values = np.array([trial.values for trial in complete])
    return [
        float(column.min() if direction.name == "MAXIMIZE" else column.max())
        for column, direction in zip(values.T, study.directions, strict=True)
    ]
