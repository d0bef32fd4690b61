"""A Gaussian process a backbone: the bandit by its definition, and the whole sampler in studies."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.errors import InputError
from tuner.sampling.per_backbone import PerValueSampler, threshold_ascent, with_expected_gain
from tuner.sampling.samplers import SamplerSpec, build_sampler
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_optuna")

PARAMETERS: dict[str, Any] = {
    "backbone": ["ffn", "resnet18", "resnet50"],
    "optimizer": ["sgd", "adamw"],
    "lr": {"low": 1e-4, "high": 1, "log": True},
    "momentum": {"low": 0.5, "high": 0.9, "step": 0.1, "when": {"optimizer": "sgd"}},
    "beta1": {"low": 0.8, "high": 0.95, "when": {"optimizer": "adamw"}},
    "batch_size": {"low": 16, "high": 256, "log": True},
    "label_smoothing": {"low": 0, "high": 0.3},
}
BEST_LR = {"ffn": 1e-1, "resnet18": 1e-3, "resnet50": 1e-2}
LEVEL = {"ffn": 0.0, "resnet18": 0.5, "resnet50": 1.0}


def make_space(**options: Any) -> SearchSpace:
    sampler = {"name": "gp", "per": "backbone", "startup_trials": 9, **options}
    return parse_space({"sampler": sampler, "parameters": PARAMETERS}, name="test")


def score(settings: dict[str, Any]) -> float:
    """Each backbone has a rate of its own, and resnet50 is the best by far."""
    miss = abs(math.log10(settings["lr"] / BEST_LR[settings["backbone"]]))
    return LEVEL[settings["backbone"]] - miss / 4 - settings["label_smoothing"]


def run(study: optuna.Study, space: SearchSpace, rounds: int, size: int = 6) -> list[Any]:
    """Rounds asked at once, as the searcher asks; the worse half of each is pruned."""
    found = []
    for _ in range(rounds):
        trials = [study.ask() for _ in range(size)]
        settings = [space.suggest(trial) for trial in trials]
        values = [score(s) for s in settings]
        for trial, value in zip(trials, values, strict=True):
            trial.report(value - 0.2, 3)
        for trial, value in zip(trials, values, strict=True):
            if value < sorted(values)[size // 2]:
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, value)
        found += settings
    return found


def with_tpe(space: SearchSpace, seed: int) -> PerValueSampler:
    """The same around a sampler that takes milliseconds; a Gaussian process takes a second."""

    def build(seed: int) -> TPESampler:
        return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=3, seed=seed)

    return PerValueSampler(space, per="backbone", build=build, startup_each=3, seed=seed)


def new_study(space: SearchSpace, seed: int, storage: Any = None) -> optuna.Study:
    return optuna.create_study(
        study_name="test",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        sampler=with_tpe(space, seed),
    )


def test_it_finds_each_backbones_rate_and_spends_most_on_the_best() -> None:
    space = make_space()
    found = run(new_study(space, 0), space, 12)
    assert Counter(s["backbone"] for s in found[:9]) == dict.fromkeys(BEST_LR, 3)
    counts = Counter(s["backbone"] for s in found[36:])
    assert counts["resnet50"] == max(counts.values()) > 18
    best = max(found, key=score)
    assert best["backbone"] == "resnet50" and score(best) > 0.9


def test_gaussian_processes_beat_chance_with_the_same_trials() -> None:
    numbers = ("backbone", "lr", "label_smoothing")
    parameters = {name: PARAMETERS[name] for name in numbers}
    parameters["backbone"] = ["ffn", "resnet50"]
    sampler = {"name": "gp", "per": "backbone", "startup_trials": 8}
    space = parse_space({"sampler": sampler, "parameters": parameters}, name="test")
    study = optuna.create_study(
        direction="maximize", sampler=build_sampler(space.sampler, space, 0)
    )
    found = run(study, space, 4, size=5)
    chance = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    late = statistics.median(map(score, found[10:]))
    assert late > statistics.median(map(score, run(chance, space, 4, size=5))) + 0.2
    assert max(map(score, found)) > 0.9


def test_the_same_seed_proposes_the_same_trials() -> None:
    space = make_space()
    first, second, other = (run(new_study(space, seed), space, 4) for seed in (5, 5, 6))
    assert first == second != other


def test_two_processes_that_know_the_same_study_propose_the_same() -> None:
    """Nothing that a proposal rests on is kept in the sampler: a resumed study goes on as well."""
    space = make_space()
    storage = optuna.storages.InMemoryStorage()
    run(new_study(space, 1, storage), space, 4)
    proposals = []
    for _ in range(2):
        again = new_study(space, 9, storage)
        trial = again.ask()
        proposals.append(space.suggest(trial))
        again.tell(trial, state=TrialState.FAIL)
        storage.delete_study(again._study_id)
        run(new_study(space, 1, storage), space, 4)
    assert proposals[0] == proposals[1]


def test_a_round_keeps_apart_and_a_cut_off_trial_is_completed() -> None:
    space = make_space()
    study = new_study(space, 2)
    run(study, space, 4)
    left = study.ask()
    left.suggest_categorical("optimizer", ["sgd", "adamw"])
    study.sampler = with_tpe(space, 2)
    again = space.suggest(optuna.Trial(study, left._trial_id))
    assert again["optimizer"] == left.params["optimizer"]
    asked = [space.suggest(study.ask()) for _ in range(8)]
    assert len({(s["backbone"], s["lr"], s["label_smoothing"]) for s in asked}) == 8


def test_points_are_tried_as_they_are_written() -> None:
    space = make_space()
    study = new_study(space, 0)
    point = {"backbone": "resnet18", "lr": 0.5, "optimizer": "sgd", "momentum": 0.7}
    study.enqueue_trial(space.to_params(point))
    settings = space.suggest(study.ask())
    assert {key: settings[key] for key in point} == point


def test_what_violates_a_constraint_is_no_good_trial() -> None:
    """The bandit and the sub-studies hear of it: the best backbone by value is avoided."""
    space = make_space()
    study = new_study(space, 4)
    late = []
    for number in range(48):
        trial = study.ask()
        settings = space.suggest(trial)
        trial.set_constraint("size", 1.0 if settings["backbone"] == "resnet50" else -1.0)
        study.tell(trial, score(settings))
        late += [settings["backbone"]] if number >= 24 else []
    assert Counter(late)["resnet50"] < len(late) / 3


def test_gaussian_processes_are_told_of_constraints_that_some_trials_have() -> None:
    """Of a pruned trial a constraint may not be known, and Optuna's sampler wants it of all."""
    numbers = {name: PARAMETERS[name] for name in ("backbone", "lr", "label_smoothing")}
    sampler = {"name": "gp", "per": "backbone", "startup_trials": 9}
    space = parse_space({"sampler": sampler, "parameters": numbers}, name="test")
    study = optuna.create_study(
        direction="maximize", sampler=build_sampler(space.sampler, space, 0)
    )
    for number in range(11):
        trial = study.ask()
        settings = space.suggest(trial)
        trial.report(score(settings), 3)
        if number % 3 == 0:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_constraint("recall", settings["label_smoothing"] - 0.1)
            study.tell(trial, score(settings))
    assert len(study.trials) == 11


def test_several_objectives_are_refused() -> None:
    with pytest.raises(InputError, match="per: the sub-studies know one objective only"):
        parse_space(
            {
                "sampler": {"name": "gp", "per": "backbone"},
                "objectives": ["top3_accuracy", "size_mb"],
                "parameters": PARAMETERS,
            },
            name="test",
        )


def test_threshold_ascent_by_its_definition() -> None:
    """Streeter and Smith's bound, written another way: the larger root of a quadratic."""

    def bound(good: int, pulls: int, alpha: float) -> float:
        # n (u - m)^2 = 2 alpha u, solved for u by its formula
        mean = good / pulls
        middle = mean + alpha / pulls
        return middle + math.sqrt(middle**2 - mean**2)

    pulls, good = {"a": 10, "b": 30, "c": 4}, {"a": 2, "b": 9, "c": 0}
    alpha = math.log(2 * 44 * 3 / 0.1)
    bounds = {value: bound(good[value], pulls[value], alpha) for value in pulls}
    assert threshold_ascent(pulls, good) == max(bounds, key=lambda value: bounds[value]) == "c"
    assert threshold_ascent({"a": 9, "b": 9}, {"a": 1, "b": 2}) == "b"
    assert threshold_ascent({"a": 9, "b": 9}, {"a": 1, "b": 1}) == "a"
    # A value that has the good trials gets the next one, until others are known too little.
    assert threshold_ascent({"a": 40, "b": 30}, {"a": 18, "b": 0}) == "a"
    assert threshold_ascent({"a": 400, "b": 5}, {"a": 100, "b": 0}) == "b"


def ended(curve: dict[int, float], value: float | None = None) -> FrozenTrial:
    return create_trial(
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        intermediate_values=curve,
    )


def test_pruned_trials_are_told_what_they_would_have_reached() -> None:
    trials = [
        ended({3: 0.4, 9: 0.5}, 0.55),
        ended({3: 0.5, 9: 0.6}, 0.62),
        ended({3: 0.3, 9: 0.5}, 0.6),
        ended({3: 0.2}),
        ended({3: 0.4, 9: 0.45}),
        ended({}),
        ended({5: 0.1}),
    ]
    final = with_expected_gain(trials)
    assert final[:3] == [0.55, 0.62, 0.6]
    assert final[3] == pytest.approx(0.2 + 0.15)  # the median of 0.15, 0.12 and 0.3
    assert final[4] == pytest.approx(0.45 + 0.05)
    assert final[5:] == [None, 0.1]


@pytest.mark.parametrize("per", ["lr", "momentum", "epochs", "nothing"])
def test_per_names_a_choice_of_every_trial(per: str) -> None:
    message = f"per: {per} is no choice between values that every trial makes"
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        make_space(per=per)
    assert caught.value.hint == "such parameters are here: backbone, optimizer"


def test_any_sampler_can_be_inside() -> None:
    space = make_space()
    sampler = PerValueSampler(
        space, per="optimizer", build=lambda seed: RandomSampler(seed), startup_each=2, seed=0
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    assert Counter(s["optimizer"] for s in run(study, space, 1, size=4)) == {"sgd": 2, "adamw": 2}


def test_its_name_in_a_space_is_checked_like_others() -> None:
    with pytest.raises(InputError, match="unknown key 'pre'"):
        build_sampler(SamplerSpec(name="gp", options={"pre": "backbone"}), make_space(), 0)
