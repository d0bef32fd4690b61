"""Successive halving by ranks: against a plain count over all trials, however they come and end."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from tuner.sampling.halving import RungPruner

RUNGS = (1, 3)


def _should_stop(study: optuna.Study, number: int, step: int, factor: int) -> bool:
    """The rule as its definition says it, over everything that the study holds."""
    values = [t.intermediate_values[step] for t in study.trials if step in t.intermediate_values]
    own = study.trials[number].intermediate_values[step]
    return sorted(values, reverse=True)[max(1, len(values) // factor) - 1] > own


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("digits", [1, 6])  # with ties and without
def test_stops_whom_the_definition_stops(factor: int, digits: int) -> None:
    """Cohorts of six report, are judged and end in any order; some stay running for long."""
    rng = np.random.default_rng(factor)
    study = optuna.create_study(
        direction="maximize", pruner=RungPruner(rungs=RUNGS, reduction_factor=factor)
    )
    running: list[optuna.Trial] = []
    judged = {True: 0, False: 0}
    for _ in range(12):
        cohort = [study.ask() for _ in range(6)]
        for step in (*RUNGS, 4):
            for trial in cohort:
                trial.report(round(float(rng.random()), digits), step)
            stopped = []
            for trial in cohort:
                stop = trial.should_prune()
                if step in RUNGS:
                    assert stop == _should_stop(study, trial.number, step, factor)
                    judged[stop] += 1
                else:
                    assert not stop
                if stop:
                    stopped.append(trial)
            for trial in stopped:
                study.tell(trial, state=TrialState.PRUNED)
            cohort = [trial for trial in cohort if trial not in stopped]
        running += cohort
        rng.shuffle(running)  # type: ignore[arg-type]
        while len(running) > 3:
            study.tell(running.pop(), float(rng.random()))
    assert min(judged.values()) > 10


def test_a_trial_without_a_report_goes_on() -> None:
    study = optuna.create_study(pruner=RungPruner(rungs=RUNGS, reduction_factor=2))
    assert not study.ask().should_prune()


def test_one_in_one_is_no_rule() -> None:
    with pytest.raises(ValueError, match="reduction_factor >= 2"):
        RungPruner(rungs=RUNGS, reduction_factor=1)
