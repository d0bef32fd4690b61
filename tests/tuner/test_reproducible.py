"""A study that is killed while it proposes trials, and resumed, proposes the same trials."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from tuner.drivers.turns import Turns
from tuner.sampling.reproducible import reproducible_sampler
from tuner.sampling.rounds import rest_of_round, round_size
from tuner.sampling.samplers import SAMPLERS, SamplerSpec
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace

pytestmark = pytest.mark.usefixtures("one_thread")  # More threads add up in any order.

NUM_TRIALS = 28
OPTIONS: dict[str, dict[str, Any]] = {
    "tpe": {"startup_trials": 6},
    "gp": {"startup_trials": 6},
    "cmaes": {"startup_trials": 6},
}


class KilledError(BaseException):
    """The process is gone."""


def _space(sampler: str) -> SearchSpace:
    numbers: dict[str, Any] = {
        "lr": {"low": 1e-4, "high": 1, "log": True},
        "weight_decay": {"low": 0.01, "high": 1, "log": True},
        "gamma": {"when": {"loss": "focal"}, "low": 0.5, "high": 4},
    }
    if sampler in ("grid", "brute_force"):
        numbers = {"lr": [0.1, 0.2, 0.3, 0.4], "weight_decay": [0.1, 0.2, 0.3, 0.4]}
    return parse_space(
        {
            "name": "s", "trials": NUM_TRIALS, "cohort_size": 4, "pruner": "none",
            "sampler": {"name": sampler, **OPTIONS.get(sampler, {})},
            "parameters": {
                "backbone": ["ffn", "squeezenet1_1"], "loss": ["bce", "focal"], **numbers
            },
        }
    )  # fmt: skip


def _value(trial: optuna.trial.FrozenTrial) -> float:
    return -abs(math.log10(trial.params["lr"]) + 2) - len(trial.params["loss"]) / 10


def _session(storage: InMemoryStorage, space: SearchSpace, lives: float, *, seed: int) -> float:
    """One process, as `tuner.trials.searcher` goes through a study; it dies after `lives`
    suggestions. How many it has left."""
    study = optuna.create_study(
        study_name="s", storage=storage, direction="maximize", load_if_exists=True,
        sampler=reproducible_sampler(space.sampler, space, seed),
    )  # fmt: skip
    turns = Turns(study, None, trials=NUM_TRIALS)
    turns.adopt(turns.orphans(study.get_trials(states=(TrialState.RUNNING,))))

    def suggest(trial: optuna.Trial) -> None:
        space.suggest(_Mortal(trial))  # type: ignore[arg-type]

    class _Mortal:
        """Passes suggestions on while there is life."""

        def __init__(self, trial: optuna.Trial) -> None:
            self._trial = trial

        def __getattr__(self, name: str) -> Any:
            nonlocal lives
            if name.startswith("suggest"):
                lives -= 1
                if lives < 0:
                    raise KilledError
            return getattr(self._trial, name)

    while turns.unfinished or turns.left:
        if turns.unfinished:
            rest = rest_of_round(space, turns.asked)
            trials = turns.take(space.cohort_size, new=rest, suggest=suggest)
        else:
            size = round_size(space, turns.asked)
            trials = turns.take(size, new=size, suggest=suggest)
        for trial in trials:
            study.tell(trial, _value(storage.get_trial(trial._trial_id)))
    return lives


def _proposals(storage: InMemoryStorage) -> list[dict[str, Any]]:
    (study,) = storage.get_all_studies()
    return [trial.params for trial in storage.get_all_trials(study._study_id)]


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(s, marks=pytest.mark.slow) if "gp" in str(s) else s for s in SAMPLERS],
)
def test_kills_change_no_proposal(sampler: str) -> None:
    space = _space(sampler)
    undisturbed, again, killed = InMemoryStorage(), InMemoryStorage(), InMemoryStorage()
    _session(undisturbed, space, math.inf, seed=3)
    chance = random.Random(5)
    kills = 0
    while True:
        try:
            _session(killed, space, chance.randint(2, 25), seed=3)
            break
        except KilledError:
            kills += 1
    assert kills >= 5
    assert _proposals(killed) == _proposals(undisturbed)
    assert len(_proposals(killed)) == NUM_TRIALS
    _session(again, space, math.inf, seed=4)
    assert (_proposals(again) != _proposals(undisturbed)) is (sampler != "grid")


def test_trials_of_a_round_differ() -> None:
    space = _space("tpe")
    storage = InMemoryStorage()
    _session(storage, space, math.inf, seed=3)
    rates = [proposal["lr"] for proposal in _proposals(storage)]
    assert len(set(rates)) == NUM_TRIALS


def test_the_rest_of_a_round_is_known_from_its_size() -> None:
    space = parse_space(
        {
            "name": "s", "trials": 100, "cohort_size": 16, "sampler": {"name": "tpe"},
            "parameters": {"backbone": "ffn", "lr": {"low": 0.1, "high": 1}},
        }
    )  # fmt: skip
    starts, asked = [], 0
    while asked < 100:
        starts.append(asked)
        asked += round_size(space, asked)
    for start, end in itertools.pairwise(starts):
        for cut_off in range(start + 1, end + 1):
            assert rest_of_round(space, cut_off) == end - cut_off


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown sampler"):
        reproducible_sampler(SamplerSpec(name="tea"), _space("tpe"), 0)
