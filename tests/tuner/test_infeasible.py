"""Trials that cannot run here: told to Optuna so that it learns from them."""

from __future__ import annotations

import optuna
import pytest

from core.report import Outcome, Status
from tuner.sampling.bounded import BoundedSampler
from tuner.sampling.samplers import build_sampler
from tuner.spaces.file import parse_space
from tuner.studies.study import trial_records
from tuner.trials.telling import FITS, tell

pytestmark = pytest.mark.usefixtures("quiet_optuna")

SIZES = [8, 64, 512, 4096]
NUM_TRIALS = 60
SPACE = parse_space(
    {
        "name": "sizes",
        "mode": "finetune",
        "trials": NUM_TRIALS,
        "sampler": {"name": "tpe", "startup_trials": 10},
        "pruner": "none",
        "parameters": {
            "backbone": "squeezenet1_1",
            "batch_size": SIZES,
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        },
    }
)
TOO_BIG = Outcome(status=Status.INFEASIBLE, reason="a batch of 512 does not fit in memory")


def _study(seed: int) -> optuna.Study:
    sampler = build_sampler(SPACE.sampler, SPACE, seed)
    assert isinstance(sampler, BoundedSampler)
    return optuna.create_study(direction="maximize", sampler=sampler)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sampler_learns_what_does_not_fit(seed: int) -> None:
    """One batch size in four fits, so by chance a quarter of the proposals does; and no more if
    the others are told as failed, which the sampler forgets."""
    assert _num_fitting(TOO_BIG, seed) >= 15
    assert _num_fitting(Outcome(status=Status.FAILED, reason="failed"), seed) <= 12


def _num_fitting(otherwise: Outcome, seed: int) -> int:
    """How many of the last 40 proposals fit."""
    study = _study(seed)
    fitting = []
    for _ in range(NUM_TRIALS):
        trial = study.ask()
        settings = SPACE.suggest(trial)
        fits = settings["batch_size"] == SIZES[0]
        value = 0.5 + settings["lr"]  # nothing that depends on the batch
        done = Outcome(status=Status.COMPLETE, best_value=value, best_epoch=1)
        tell(study, trial, done if fits else otherwise)
        fitting.append(fits)
    return sum(fitting[-40:])


def test_what_is_told() -> None:
    study = _study(0)
    outcomes = [
        TOO_BIG,
        Outcome(status=Status.COMPLETE, best_value=0.5, best_epoch=1),
        Outcome(status=Status.FAILED, reason="diverged"),
    ]
    for outcome in outcomes:
        trial = study.ask()
        SPACE.suggest(trial)
        tell(study, trial, outcome)
    assert [t.state.name for t in study.trials] == ["PRUNED", "COMPLETE", "FAIL"]
    assert [t.constraints for t in study.trials] == [{FITS: 1.0}, {}, {}]
    assert study.best_trial.number == 1
    records = list(trial_records(study, SPACE))
    assert [r.status for r in records] == ["infeasible", "complete", "failed"]
    assert records[0].reason == TOO_BIG.reason and records[0].value is None


def test_one_that_a_kill_kept_from_being_told_is_told_again() -> None:
    study = _study(0)
    trial = study.ask()
    SPACE.suggest(trial)
    trial.set_constraint(FITS, 1.0)
    tell(study, optuna.trial.Trial(study, trial._trial_id), TOO_BIG)
    assert study.trials[0].state.name == "PRUNED"
