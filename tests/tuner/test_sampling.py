"""Samplers and pruners: each works under ask and tell, repeats from its seed, stays quiet."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from typing import Any

import optuna
import pytest

from core.errors import InputError
from tuner.sampling import exhaustive
from tuner.sampling.pruners import PRUNERS, PrunerSpec, build_pruner, rungs
from tuner.sampling.samplers import SAMPLERS, SamplerSpec, build_sampler
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace

WIDE: dict[str, Any] = {
    "backbone": ["ffn", "resnet50"],
    "head": ["linear", "mlp"],
    "hidden_sizes": {"choice": [[8], [16, 8]], "when": {"head": "mlp"}},
    "optimizer": ["sgd", "adamw"],
    "lr": [
        {"low": 1e-3, "high": 1, "log": True, "when": {"optimizer": "sgd"}},
        {"low": 1e-5, "high": 1e-2, "log": True},
    ],
    "weight_decay": {"low": 1e-6, "high": 1, "log": True},
    "batch_size": {"low": 64, "high": 256, "step": 64},
    "label_smoothing": {"low": 0, "high": 0.3},
}
# 2 backbones x (linear: 1, mlp: 2 sizes x 2 dropouts) x 3 batch sizes
FINITE: dict[str, Any] = {
    "head": ["linear", "mlp"],
    "backbone": ["ffn", "resnet50"],
    "hidden_sizes": {"choice": [[8], [16, 8]], "when": {"head": "mlp"}},
    "dropout": {"low": 0, "high": 0.5, "step": 0.5, "when": {"head": "mlp"}},
    "batch_size": {"low": 64, "high": 192, "step": 64},
}
FINITE_SIZE = 30


def make_space(parameters: dict[str, Any], sampler: str = "tpe") -> SearchSpace:
    return parse_space({"sampler": sampler, "parameters": parameters}, name="test")


def make_study(space: SearchSpace, seed: int, pruner: str = "none") -> optuna.Study:
    return optuna.create_study(
        study_name="fixed",  # hyperband's brackets depend on it
        direction="maximize",
        sampler=build_sampler(space.sampler, space, seed),
        pruner=build_pruner(PrunerSpec(name=pruner), 9),
    )


def score(settings: dict[str, Any]) -> float:
    return float(settings["optimizer"] == "adamw") - settings.get("label_smoothing", 0)


def run(space: SearchSpace, seed: int, *, num_rounds: int = 4, pruner: str = "none") -> list[Any]:
    """Rounds of 8 trials asked at once, each with two reported epochs."""
    study = make_study(space, seed, pruner)
    found = []
    for _ in range(num_rounds):
        trials = [study.ask() for _ in range(8)]
        settings = [space.suggest(trial) for trial in trials]
        for trial, values in zip(trials, settings, strict=True):
            trial.report(score(values), 1)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, score(values))
        found += settings
    return found


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_sampler_repeats_from_its_seed(name: str) -> None:
    finite = name in ("grid", "brute_force")
    space = make_space(FINITE | {"optimizer": "adamw"} if finite else WIDE, name)
    first = run(space, 7, num_rounds=3)
    assert run(space, 7, num_rounds=3) == first
    if name != "grid":
        assert run(space, 8, num_rounds=3) != first


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_sampler_is_quiet(name: str, caplog: pytest.LogCaptureFixture) -> None:
    finite = name in ("grid", "brute_force")
    space = make_space(FINITE | {"optimizer": "adamw"} if finite else WIDE, name)
    optuna.logging.enable_propagation()
    optuna.logging.disable_default_handler()
    try:
        run(space, 0, num_rounds=3)
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.enable_default_handler()
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_tpe_learns_beside_each_pruner(pruner: str) -> None:
    space = make_space(WIDE)
    late = [settings["optimizer"] for settings in run(space, 0, num_rounds=8, pruner=pruner)[32:]]
    assert Counter(late)["adamw"] >= 24


@pytest.mark.parametrize("name", ["grid", "brute_force"])
def test_exhaustive_tries_each_configuration_once(name: str) -> None:
    space = make_space(FINITE, name)
    assert space.size() == FINITE_SIZE
    study = make_study(space, 0)
    found = []
    for _ in range(FINITE_SIZE // 5):
        trials = [study.ask() for _ in range(5)]  # all asked before any has its settings
        found += [space.suggest(trial) for trial in trials]
        study.tell(trials[0], state=optuna.trial.TrialState.FAIL)
        for trial in trials[1:]:
            study.tell(trial, 0.0)
    as_text = [repr(sorted(settings.items())) for settings in found]
    assert len(set(as_text)) == FINITE_SIZE
    assert sorted(as_text) == sorted(
        repr(sorted(space.from_params(params).items())) for params in space.configurations()
    )


def test_grid_goes_in_the_order_of_the_file() -> None:
    space = make_space({"backbone": ["ffn", "vgg16"], "batch_size": [32, 64]}, "grid")
    study = make_study(space, 0)
    found = [tuple(space.suggest(study.ask()).values())[1:] for _ in range(4)]
    assert found == [("ffn", 32), ("ffn", 64), ("vgg16", 32), ("vgg16", 64)]


def test_exhaustive_goes_on_after_a_resume_and_past_enqueued_points() -> None:
    space = make_space(FINITE, "brute_force")
    study = make_study(space, 0)
    points = [
        {"head": "mlp", "backbone": "ffn", "hidden_sizes": [8], "dropout": 0.5, "batch_size": 64},
        {"head": "linear"},
    ]
    for point in points:
        study.enqueue_trial(space.to_params(point))
    first = [study.ask() for _ in range(10)]
    found = [space.suggest(trial) for trial in first]
    assert found[0] == {"mode": "probe", **points[0]}
    assert found[1]["head"] == "linear"
    study.tell(first[0], 1.0)
    # Another process: nothing is known but the storage. Nine of the ten are still running.
    again = optuna.load_study(
        study_name="fixed",
        storage=study._storage,
        sampler=build_sampler(space.sampler, space, 0),
    )
    found += [space.suggest(again.ask()) for _ in range(FINITE_SIZE - 10)]
    assert len({repr(sorted(settings.items())) for settings in found}) == FINITE_SIZE


def test_exhaustive_says_that_it_repeats(caplog: pytest.LogCaptureFixture) -> None:
    space = make_space({"backbone": ["ffn", "vgg16"]}, "grid")
    study = make_study(space, 0)
    for _ in range(2):
        space.suggest(study.ask())
    assert "taken" not in caplog.text
    assert space.suggest(study.ask())["backbone"] in ("ffn", "vgg16")
    assert "All 2 configurations are taken" in caplog.text


@pytest.mark.parametrize("name", ["grid", "brute_force"])
def test_exhaustive_refuses_an_endless_space(name: str) -> None:
    with pytest.raises(InputError, match=r"test, sampler: lr, label_smoothing can take endlessly"):
        make_space({k: v for k, v in WIDE.items() if k != "weight_decay"}, name)


def test_exhaustive_refuses_a_huge_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "MAX_CONFIGURATIONS", 29)
    with pytest.raises(InputError, match=r"the space has 30 configurations, more than 29"):
        make_space(FINITE, "grid")


def test_qmc_covers_each_parameter_evenly_conditions_or_not() -> None:
    """Of 64 points of a scrambled Sobol sequence, each eighth of a coordinate holds eight; the
    conditional lr of sgd has its own coordinate, so that its half of them is as even."""
    space = make_space(WIDE, "qmc")
    study = make_study(space, 0)
    trials = [study.ask() for _ in range(64)]
    found = [space.suggest(trial) for trial in trials]
    assert set(Counter(int(s["label_smoothing"] / 0.3 * 8) for s in found).values()) == {8}
    for name in ("backbone", "head", "optimizer", "batch_size"):
        counts = Counter(s[name] for s in found)
        assert max(counts.values()) == min(counts.values()), name
    drawn = [t.relative_params["lr|optimizer=sgd"] for t in trials]
    assert set(Counter(int((math.log10(lr) + 3) / 3 * 8) for lr in drawn).values()) == {8}


def ends_of(spec: PrunerSpec, max_epochs: int) -> Counter[int]:
    """At which epoch a study of 27 trials, worse from one to the next, ends each."""
    study = optuna.create_study(direction="maximize", pruner=build_pruner(spec, max_epochs))
    ends: Counter[int] = Counter()
    for quality in range(27, 0, -1):
        trial = study.ask()
        for epoch in range(1, max_epochs + 1):
            trial.report(float(quality), epoch)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(quality))
        ends[epoch] += 1
    return ends


def test_successive_halving_stops_at_its_rungs() -> None:
    assert set(ends_of(PrunerSpec(options={"min_epochs": 2}), 18)) == {2, 18}
    assert set(ends_of(PrunerSpec(), 27)) == {9, 27}  # a third of 27
    assert set(ends_of(PrunerSpec(), 5)) == {1, 5}


@pytest.mark.parametrize(
    ("options", "max_epochs", "expected"),
    [
        ({}, 30, (10,)),
        ({}, 31, (10,)),  # 30 would end what is all but done
        ({}, 2, (1,)),
        ({"min_epochs": 3}, 30, (3, 9)),  # 27 of 30, too
        ({"min_epochs": 3, "reduction_factor": 2}, 24, (3, 6, 12)),  # half way is early enough
        ({"min_epochs": 20}, 30, (20,)),  # asked for
        ({"min_epochs": 30}, 30, ()),
        ({"min_epochs": 100}, 30, ()),
    ],
)
def test_rungs_of_successive_halving(
    options: dict[str, int], max_epochs: int, expected: tuple[int, ...]
) -> None:
    """By hand; and trials of one value after the other, best last, pass them all."""
    spec = PrunerSpec(options=options)
    assert rungs(spec, max_epochs) == expected
    assert set(ends_of(spec, max_epochs)) <= {*expected, max_epochs}


def test_late_bloomers_live_past_a_warm_up() -> None:
    """Of nine trials one learns slowly and ends best, as under a long warm-up: by default it is not
    stopped while it warms up, and with a first rung at a ninth it is."""
    epochs = 27
    slow = [0.0] * 8 + [1.0] * (epochs - 8)
    curves = [[0.5 + place / 100] * epochs for place in range(8)] + [slow]

    def ended(spec: PrunerSpec) -> str:
        study = optuna.create_study(direction="maximize", pruner=build_pruner(spec, epochs))
        running = [(study.ask(), curve) for curve in curves]
        for rung in rungs(spec, epochs):
            for trial, curve in running:
                trial.report(curve[rung - 1], rung)
            stopped = [(trial, curve) for trial, curve in running if trial.should_prune()]
            for trial, _ in stopped:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            running = [pair for pair in running if pair not in stopped]
        for trial, curve in running:
            study.tell(trial, max(curve))
        return study.trials[8].state.name

    assert ended(PrunerSpec()) == "COMPLETE"
    assert ended(PrunerSpec(options={"min_epochs": epochs // 9})) == "PRUNED"


def test_median_spares_the_first_trials_and_epochs() -> None:
    spec = PrunerSpec(name="median", options={"startup_trials": 4, "min_epochs": 3})
    ends = ends_of(spec, 9)
    assert ends == {9: 4, 3: 23}


def test_no_pruner_stops_nothing() -> None:
    assert ends_of(PrunerSpec(name="none"), 9) == {9: 27}
    assert rungs(PrunerSpec(name="none"), 9) == ()


@pytest.mark.parametrize("min_epochs", [1, 50])
def test_hyperband_takes_any_first_rung(min_epochs: int) -> None:
    spec = PrunerSpec(name="hyperband", options={"min_epochs": min_epochs})
    assert sum(ends_of(spec, 9).values()) == 27


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            SamplerSpec(name="tppe"),
            "unknown sampler 'tppe'\n  did you mean tpe? valid: brute_force",
        ),
        (
            SamplerSpec(options={"startup_trails": 3}),
            "sampler.startup_trails: unknown key 'startup_trails'\n  did you mean startup_trials?",
        ),
        (
            SamplerSpec(options={"startup_trials": 0}),
            "sampler.startup_trials: input should be greater than or equal to 1, but got 0",
        ),
        (
            SamplerSpec(name="random", options={"startup_trials": 3}),
            "unknown key 'startup_trials'\n  it has no keys",
        ),
        (
            SamplerSpec(name="qmc", options={"sequence": "sobel"}),
            "sampler.sequence: input should be 'sobol' or 'halton', but got 'sobel'",
        ),
    ],
)
def test_wrong_sampler(spec: SamplerSpec, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build_sampler(spec, make_space(WIDE), 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PrunerSpec(name="asha"), "unknown pruner 'asha'\n  valid: hyperband, median, none, succ"),
        (
            PrunerSpec(options={"reduction_factor": 1}),
            "pruner.reduction_factor: input should be greater than or equal to 2, but got 1",
        ),
        (
            PrunerSpec(options={"min_epochs": "3"}),
            "pruner.min_epochs: input should be a valid integer, but got '3'",
        ),
    ],
)
def test_wrong_pruner(spec: PrunerSpec, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build_pruner(spec, 30)
