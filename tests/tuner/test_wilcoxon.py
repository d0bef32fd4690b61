"""Pruning by folds: the rule against SciPy's test, the folds' values from training to the study."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import wilcoxon

from core.config import TrialConfig
from core.errors import InputError
from core.probing.probe import train_probes
from core.report import Outcome, Status
from tuner.sampling.pruners import PrunerSpec, build_pruner
from tuner.sampling.samplers import build_sampler
from tuner.sampling.wilcoxon import FoldPruner, check_folds, fold_values
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.plan import make_plan
from tuner.trials.context import FeatureRequest, request_of
from tuner.trials.searcher import Budget, CohortSearcher

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_optuna")

NUM_FOLDS, NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 5, 100, 8, 6
KEY = "validation_top3_accuracy"


def make_space(**pruner: Any) -> SearchSpace:
    parameters = {
        "backbone": "ffn",
        "lr": {"low": 1e-6, "high": 0.3, "log": True},
        "batch_size": 20,
        "epochs": 10,
    }
    values = {
        "parameters": parameters,
        "sampler": "random",
        "pruner": {"name": "wilcoxon", **pruner},
        "cohort_size": 8,
        "trials": 24,
    }
    return parse_space(values, name="test")


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_it_stops_whom_the_test_finds_worse(threshold: float) -> None:
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize", pruner=FoldPruner(p_threshold=threshold))
    best = study.ask()
    of_best = rng.normal(0.5, 0.02, 8)
    best.set_user_attr(fold_values(3), of_best.tolist())
    best.report(float(of_best.mean()), 3)
    study.tell(best, 0.9)
    judged = {True: 0, False: 0}
    for _ in range(40):
        trial = study.ask()
        values = of_best + rng.normal(rng.choice([-0.02, 0.0, 0.02]), 0.02, 8)
        trial.set_user_attr(fold_values(3), values.tolist())
        trial.report(float(values.mean()), 3)
        p = wilcoxon(values - of_best, alternative="less", zero_method="zsplit").pvalue
        stops = p < threshold and values.mean() < of_best.mean()
        assert trial.should_prune() == stops
        judged[bool(stops)] += 1
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert min(judged.values()) > 5


def test_what_it_does_not_know_it_does_not_stop() -> None:
    study = optuna.create_study(direction="maximize", pruner=FoldPruner(p_threshold=0.1))

    def trial(values: list[float] | None, epoch: int = 3) -> optuna.Trial:
        asked = study.ask()
        if values is not None:
            asked.set_user_attr(fold_values(epoch), values)
        asked.report(0.1, epoch)
        return asked

    assert not study.ask().should_prune()
    assert not trial([0.1] * 5).should_prune()  # none is complete
    study.tell(trial([0.9] * 5), 0.9)
    assert trial([0.1] * 5).should_prune()
    assert not trial(None).should_prune()
    assert not trial([0.1] * 4).should_prune()  # of another split
    assert not trial([0.1] * 5, epoch=9).should_prune()  # the best was not measured there


def test_it_is_asked_at_few_epochs() -> None:
    space = make_space()
    assert make_plan(space, trials=8, hours=None).rungs == (1, 3, 9)
    space = make_space(min_epochs=4)
    assert make_plan(space, trials=8, hours=None).rungs == (4,)


@pytest.mark.parametrize(
    ("pruner", "folds", "message", "hint"),
    [
        (
            {},
            None,
            "it compares trials fold by fold, and there is one validation part",
            "--folds 5",
        ),
        ({}, 3, "3 folds cannot fall below 0.125, so that p_threshold 0.1 never", "0.15}"),
        ({"p_threshold": 0.01}, 6, "6 folds cannot fall below 0.015625", "more --folds"),
    ],
)
def test_too_few_folds(pruner: dict[str, Any], folds: int | None, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check_folds(make_space(**pruner), folds)
    assert caught.value.where == "test, pruner: wilcoxon" and hint in str(caught.value.hint)


def test_enough_folds_and_other_pruners_pass() -> None:
    check_folds(make_space(), 4)
    check_folds(make_space(p_threshold=0.15), 3)
    check_folds(parse_space({"parameters": {"backbone": "ffn"}}, name="test"), None)
    # The smallest p-value of so many folds is the one that the message is about.
    for folds in (3, 4, 6):
        assert wilcoxon([-0.1 * k for k in range(1, folds + 1)], alternative="less").pvalue == (
            0.5**folds
        )


def test_the_command_asks_for_folds(
    refused: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "folds.yaml"
    path.write_text("pruner: wilcoxon\nparameters: {backbone: ffn}\n")
    refused("search", path, "--data", data, says=("pruner: wilcoxon", "--folds 5"))
    refused("search", path, "--data", data, "--folds", 3, says=("3 folds", "p_threshold 0.1"))


# ---- from training to the study ---------------------------------------------------------------


def data_of(seed: int = 0) -> tuple[np.ndarray, torch.Tensor, list[tuple[Any, Any]]]:
    """Classes that a linear head can tell, and folds of their rows."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    scores = features @ rng.standard_normal((NUM_FEATURES, NUM_CLASSES))
    targets_NC = torch.from_numpy(scores >= np.sort(scores, axis=1)[:, -2:-1]).float()
    parts = np.array_split(rng.permutation(NUM_ROWS), NUM_FOLDS)
    rows = np.arange(NUM_ROWS)
    return features, targets_NC, [(np.setdiff1d(rows, p), np.sort(p)) for p in parts]


def test_a_fold_is_reported_as_if_it_were_trained_alone() -> None:
    features, targets_NC, folds = data_of()
    configs = [
        TrialConfig(backbone="ffn", lr=lr, epochs=3, batch_size=20, seed=1) for lr in (1e-2, 1e-1)
    ]
    together = train_probes(features, targets_NC, folds, configs)
    alone = [train_probes(features, targets_NC, [fold], configs) for fold in folds]
    for place, outcome in enumerate(together):
        for epoch, metrics in enumerate(outcome.curve):
            values = [metrics[f"{KEY}_fold_{k}"] for k in range(1, NUM_FOLDS + 1)]
            assert metrics[KEY] == pytest.approx(np.mean(values))
            assert values == [one[place].curve[epoch][KEY] for one in alone]
    assert not any("fold" in name for name in alone[0][0].curve[0])


class DirectChannel:
    """The channel within one process."""

    def __init__(self) -> None:
        self.rulings: dict[tuple[str, int], tuple[int, ...]] = {}
        self.delivered: dict[str, list[Any]] = {}

    def rule(self, cohort: str, epoch: int, places: Any) -> None:
        self.rulings[cohort, epoch] = tuple(places)

    def ruling(self, cohort: str, epoch: int) -> tuple[int, ...]:
        return self.rulings.pop((cohort, epoch), ())

    def collect(self, cohort: str) -> list[Any]:
        return self.delivered.pop(cohort, [])


def test_a_study_of_real_heads_prunes_by_fold(tmp_path: Path) -> None:
    """Cohorts report as on a worker; the searcher judges. Rates far too small are stopped at the
    first rung by the folds, once a round is complete, and the best rate is kept."""
    from tuner.trials.cohort import tune_report

    features, targets_NC, folds = data_of()
    space = make_space(min_epochs=3)
    plan = make_plan(space, trials=24, hours=None)
    study = optuna.create_study(
        direction="maximize",
        sampler=build_sampler(space.sampler, space, 0),
        pruner=build_pruner(PrunerSpec(name="wilcoxon", options={"min_epochs": 3}), 10),
    )
    channel = DirectChannel()
    request: FeatureRequest = request_of(TrialConfig(backbone="ffn"))
    searcher = CohortSearcher(
        study,
        space,
        budget=Budget(trials=24),
        features={request: "nowhere"},
        channel=channel,  # type: ignore[arg-type]
        log=OutcomeLog(tmp_path),
        watchers=[],
        seed=0,
        rungs=plan.rungs,
    )
    while isinstance(job := searcher.suggest("tune"), dict):
        name = job["cohort"]
        report = tune_report(
            name,
            _Rungs(plan.rungs),  # type: ignore[arg-type]
            channel,  # type: ignore[arg-type]
            lambda result: searcher.on_trial_result("tune", result),
        )
        configs = [TrialConfig.from_dict(values) for values in job["trials"]]
        outcomes: list[Outcome] = train_probes(features, targets_NC, folds, configs, report=report)
        channel.delivered[name] = [outcomes]
        searcher.on_trial_complete("tune", {})
        assert name != "cohort-1" or {o.status for o in outcomes} == {Status.COMPLETE}
    trials = study.get_trials()
    states = [trial.state.name for trial in trials]
    assert len(trials) == 24 and set(states) == {"COMPLETE", "PRUNED"}
    assert 6 <= states.count("PRUNED") <= 15
    best = study.best_trial
    for trial in trials[8:]:
        values = trial.user_attrs[fold_values(3)]
        assert len(values) == NUM_FOLDS
        assert trial.intermediate_values[3] == pytest.approx(np.mean(values))
        if trial.state.name == "PRUNED":
            assert trial.last_step == 3 and np.mean(values) < best.value
    assert best.params["lr"] > 3e-3


class _Rungs:
    """What `tune_report` reads of a context."""

    objective = "top3_accuracy"

    def __init__(self, rungs: tuple[int, ...]) -> None:
        self.rungs = rungs
