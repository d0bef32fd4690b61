"""Constraints: read from a space, judged before training and after, told to Optuna, kept to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from sklearn.metrics import recall_score

from core.config import TrialConfig
from core.errors import InputError
from core.metrics import worst_class_recall
from core.report import Outcome, Status
from tuner.finalists.winner import best_candidates
from tuner.goals.constraints import RECALL, judged, violations, why_not
from tuner.goals.costs import Shape, shape_of
from tuner.goals.judge import Judge, affordable
from tuner.sampling.samplers import build_sampler
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace, load_space
from tuner.studies.plan import make_plan
from tuner.studies.study import trial_records
from tuner.trials.telling import tell

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def _space(**changes: Any) -> SearchSpace:
    values: dict[str, Any] = {
        "name": "bounded",
        "trials": 60,
        "sampler": {"name": "tpe", "startup_trials": 10},
        "pruner": "none",
        "parameters": {
            "backbone": ["ffn", "squeezenet1_1", "resnet18", "resnet34"],
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        },
    }
    return parse_space(values | changes)


COSTS = {"ffn": 1.0, "squeezenet1_1": 5.0, "resnet18": 20.0, "resnet34": 40.0}


def _costs(size_mb: float = 10.0) -> dict[Shape, dict[str, float]]:
    return {
        shape_of(TrialConfig(backbone=name)): {"latency_ms": latency, "size_mb": size_mb}
        for name, latency in COSTS.items()
    }


# ---- the metric ---------------------------------------------------------------------------------


def test_the_worst_class_is_judged_by_enough_pictures() -> None:
    """Recall at three of each class, by scikit-learn on the three highest scores."""
    rng = np.random.default_rng(0)
    targets_NC = (rng.random((200, 6)) < [0.5, 0.3, 0.2, 0.15, 0.1, 0.02]).astype(int)
    scores_NC = rng.random((200, 6)) + 0.3 * targets_NC + [0.3, 0.2, 0.1, 0, -0.2, -1.5]
    predicted_NC = np.zeros_like(targets_NC)
    np.put_along_axis(predicted_NC, np.argsort(-scores_NC)[:, :3], 1, axis=1)
    recalls_C = recall_score(targets_NC, predicted_NC, average=None)
    counts_C = targets_NC.sum(0)
    assert counts_C[5] < 10 <= counts_C[4]
    assert recalls_C[5] < recalls_C[:5].min(), "the rarest would be the worst"
    scores, targets = torch.from_numpy(scores_NC), torch.from_numpy(targets_NC)
    assert worst_class_recall(scores, targets) == pytest.approx(recalls_C[:5].min())
    assert worst_class_recall(scores, targets, min_positives=1) == pytest.approx(recalls_C.min())
    assert worst_class_recall(scores, targets, min_positives=201) is None


# ---- in a space ---------------------------------------------------------------------------------


def test_a_space_keeps_its_constraints() -> None:
    bounds = {"latency_ms": 20.0, "size_mb": 50.0, "min_class_recall": 0.05}
    space = _space(constraints=bounds)
    assert space.constraints == bounds and space.costs == ("latency_ms", "size_mb")
    assert parse_space(space.to_dict()).constraints == bounds
    assert space.fingerprint() != _space().fingerprint()
    assert "constraints" not in _space().to_dict()
    assert _space().costs == ()


def test_both_parts_of_a_space_share_them() -> None:
    space = parse_space(
        {
            "name": "two",
            "constraints": {"latency_ms": 20.0},
            "objectives": ["top3_accuracy", "size_mb"],
            "probe": {"parameters": {"backbone": "squeezenet1_1"}},
            "finetune": {"parameters": {"backbone": "squeezenet1_1", "unfrozen_stages": [0, 1]}},
        }
    )
    assert space.finetune is not None
    for part in space.parts:
        assert part.constraints == {"latency_ms": 20.0} and part.minimised == ("size_mb",)
    assert parse_space(space.to_dict()).to_dict() == space.to_dict()
    part = parse_space(space.finetune.to_dict(), after_probes=True)
    assert (part.constraints, part.minimised) == (space.constraints, space.minimised)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("constraints: {latency: 20}", "line 2, constraints.latency: unknown key 'latency'"),
        ("constraints: {latency_ms: 0}", "constraints.latency_ms: input should be greater than 0"),
        ("constraints: {latency_ms: fast}", "constraints.latency_ms: input should be a valid numb"),
        ("constraints: {min_class_recall: 1}", "min_class_recall: input should be less than 1"),
        ("constraints: 3", "constraints: input should be a valid"),
        ("objectives: [latency_ms]", "line 2, objectives[0]: 'latency_ms' is no metric of valid"),
        ("objectives: [top3_accuracy, speed]", "objectives[1]: unknown cost 'speed'"),
        (
            "objectives: [top3_accuracy, size_mb, size_mb]",
            "objectives[2]: 'size_mb' is there twice",
        ),
        (
            "objectives: [top3_accuracy, size_mb]\nobjective: top3_accuracy",
            "objectives: it is given beside objective",
        ),
        (
            "objectives: [top3_accuracy, size_mb]\nsampler: cmaes",
            "sampler: cmaes knows one objective only\n  with several objectives: tpe, random, gp",
        ),
        (
            "objectives: [top3_accuracy, size_mb]\npruner: hyperband",
            "pruner: hyperband knows one objective only\n"
            "  with several objectives: successive_halving, none",
        ),
    ],
)
def test_a_mistake_is_pointed_at(yaml: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"parameters: {{backbone: ffn, image_size: 32}}\n{yaml}\n")
    with pytest.raises(InputError) as caught:
        load_space(path)
    assert says in str(caught.value)


def _write(space: Path, line: str) -> Path:
    space.write_text(f"{space.read_text()}{line}\n")
    return space


def test_what_cannot_be_judged_is_refused(
    refused: Callable[..., str], data: Path, space: Path
) -> None:
    _write(space, "constraints: {min_class_recall: 0.1}")
    says = ("space tiny, constraints.min_class_recall: no class has 10 of the", "more pictures")
    refused("search", space, "--data", data, says=says)
    flags = ("--data", data, "--ensemble", "3")
    refused("search", space, *flags, says=("--ensemble, beside space tiny", "leave out --ensemble"))


def test_goals_are_said_before_the_start(
    tuner: Callable[..., Any], data: Path, space: Path
) -> None:
    _write(space, "objectives: [top3_accuracy, size_mb]\nconstraints: {latency_ms: 20}")
    goals = "highest top3_accuracy, lowest size_mb; latency_ms at most 20"
    assert goals in tuner("space", "check", space).out
    ended = tuner("search", space, "--data", data, "--weights", "none", "--dry-run")
    # In a table of 80 columns the line may be broken.
    assert ended.code == 0 and goals in " ".join(ended.out.split()), ended.err


# ---- judging ------------------------------------------------------------------------------------


def test_violations_are_shares_of_the_bound() -> None:
    bounds = {"latency_ms": 20.0, "min_class_recall": 0.1}
    found = violations(bounds, {"latency_ms": 30.0, RECALL: 0.075})
    assert found == pytest.approx({"latency_ms": 0.5, "min_class_recall": 0.25})
    kept = violations(bounds, {"latency_ms": 20.0, RECALL: 0.2})
    assert kept == pytest.approx({"latency_ms": 0.0, "min_class_recall": -1.0})
    assert violations(bounds, {"latency_ms": 5.0}).keys() == {"latency_ms"}, "as far as known"
    assert why_not(bounds, {"latency_ms": 20.0, RECALL: 0.1}) == ""
    assert why_not(bounds, {"latency_ms": 31.24, RECALL: 0.02}) == (
        "one picture takes 31.2 ms, and latency_ms is 20; "
        "its worst class has a recall of 0.020, and min_class_recall is 0.1"
    )


def test_a_complete_trial_is_judged_and_keeps_its_value() -> None:
    outcome = Outcome(
        status=Status.COMPLETE, best_value=0.6, best_epoch=2, best_metrics={RECALL: 0.02}
    )
    found = judged({"min_class_recall": 0.05}, outcome)
    assert found.status is Status.INFEASIBLE and found.best_value == 0.6
    assert "recall of 0.020" in found.reason
    assert judged({"min_class_recall": 0.02}, outcome) == outcome
    pruned = dataclasses.replace(outcome, status=Status.PRUNED, best_metrics={})
    assert judged({"min_class_recall": 0.05}, pruned) == pruned
    with pytest.raises(KeyError, match="worst_class_recall"):
        judged({"min_class_recall": 0.05}, dataclasses.replace(outcome, best_metrics={}))


def test_costs_are_judged_before_training() -> None:
    judge = Judge(bounds={"latency_ms": 10.0}, costs=_costs())
    assert judge.refused(TrialConfig(backbone="squeezenet1_1")) is None
    refused = judge.refused(TrialConfig(backbone="resnet18"))
    assert refused is not None and refused.status is Status.INFEASIBLE
    assert refused.best_value is None and refused.best_metrics["latency_ms"] == 20.0
    done = Outcome(status=Status.COMPLETE, best_value=0.5, best_epoch=1, best_metrics={"a": 1.0})
    ended = judge.ended(TrialConfig(backbone="ffn"), done)
    assert ended.best_metrics == {"a": 1.0, "latency_ms": 1.0, "size_mb": 10.0}
    assert Judge().refused(TrialConfig(backbone="resnet34")) is None


def test_features_of_backbones_that_cost_too_much_are_not_computed() -> None:
    space = _space(constraints={"latency_ms": 10.0})
    plan = make_plan(space, trials=None, hours=None)
    assert len(plan.requests) == 4
    judge = Judge(bounds=space.constraints, costs=_costs())
    left = affordable(plan, space, judge).requests
    assert [r.backbone for r in left] == ["ffn", "squeezenet1_1"]
    assert affordable(plan, space, Judge()) == plan


# ---- Optuna -------------------------------------------------------------------------------------


def _search(
    space: SearchSpace, judge: Judge, seed: int = 0, *, prunes: bool = False
) -> optuna.Study:
    """The trials as the searcher runs them, with values that favour what costs most; some are
    stopped half-way if it `prunes`, so that their recall is not known."""
    study = optuna.create_study(
        direction="maximize", sampler=build_sampler(space.sampler, space, seed)
    )
    for _ in range(space.trials):
        trial = study.ask()
        config = TrialConfig.from_dict({**space.suggest(trial), "seed": 0})
        outcome = judge.refused(config)
        if outcome is None:
            value = COSTS[config.backbone] / 100 + 0.1 * math.exp(-abs(math.log10(config.lr) + 2))
            recall = {RECALL: 0.02 if config.backbone == "resnet18" else 0.1}
            done = Outcome(
                status=Status.COMPLETE, best_value=value, best_epoch=1, best_metrics=recall
            )
            if prunes and trial.number % 3 == 2:
                trial.report(value, 1)
                done = dataclasses.replace(done, status=Status.PRUNED, best_metrics={})
            outcome = judge.ended(config, done)
        tell(study, trial, outcome, space)
    return study


def test_the_sampler_turns_to_what_may_win() -> None:
    """The best of four backbones is too slow and the second unfair to a class; by chance the third
    is every fourth proposal. (Over four seeds, 15 to 18 of 30 were, and 3 to 5 without bounds.)"""
    space = _space(constraints={"latency_ms": 30.0, "min_class_recall": 0.05})

    def last(judge: Judge) -> list[str]:
        return [trial.params["backbone"] for trial in _search(space, judge).trials[-30:]]

    bounded = last(Judge(bounds=space.constraints, costs=_costs()))
    assert bounded.count("squeezenet1_1") >= 12
    assert last(Judge()).count("squeezenet1_1") <= 8


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("per", [None, "backbone"])
def test_the_gaussian_process_takes_and_learns_them(per: str | None) -> None:
    """Also of trials that were refused, which have no value, and of those that were pruned, whose
    recall is not known. (Over backbones, the bandit spreads so few trials about evenly.)"""
    sampler = {"name": "gp", "startup_trials": 8} | ({"per": per} if per else {})
    bounds = {"latency_ms": 30.0, "min_class_recall": 0.05}
    space = _space(constraints=bounds, sampler=sampler, trials=18)
    judge = Judge(bounds=bounds, costs=_costs())
    study = _search(space, judge, prunes=True)
    found = {frozenset(t.constraints) for t in study.trials}
    assert found == {frozenset(bounds), frozenset({"latency_ms"})}
    assert {t.state.name for t in study.trials} == {"COMPLETE", "PRUNED"}
    if per is None:
        last = [trial.params["backbone"] for trial in study.trials[-10:]]
        assert last.count("squeezenet1_1") >= 5, "two or three by chance"


def test_what_optuna_and_people_see_of_them() -> None:
    space = _space(constraints={"latency_ms": 30.0, "min_class_recall": 0.05}, trials=40)
    study = _search(space, Judge(bounds=space.constraints, costs=_costs()))
    records = {r.number: r for r in trial_records(study, space)}
    seen = set()
    for trial in study.trials:
        backbone, record = trial.params["backbone"], records[trial.number]
        seen.add(backbone)
        expected = {
            "ffn": ("COMPLETE", "complete"),
            "squeezenet1_1": ("COMPLETE", "complete"),
            "resnet18": ("COMPLETE", "infeasible"),
            "resnet34": ("PRUNED", "infeasible"),
        }[backbone]
        assert (trial.state.name, record.status) == expected
        assert record.metrics["latency_ms"] == COSTS[backbone]
        assert (record.reason == "") == (record.status == "complete")
        violated = {name for name, share in trial.constraints.items() if share > 0}
        assert violated == {"resnet18": {"min_class_recall"}, "resnet34": {"latency_ms"}}.get(
            backbone, set()
        )
        assert (record.value is None) == (backbone == "resnet34")
    assert seen == set(COSTS)
    assert study.best_trial.params["backbone"] == "squeezenet1_1", "Optuna agrees who is best"
    plan = make_plan(space, trials=None, hours=None)
    features = dict.fromkeys(plan.requests, "folder")
    candidates = best_candidates(list(records.values()), features, 0, study="s", count=99)
    assert {c.config.backbone for c in candidates} == {"ffn", "squeezenet1_1"}
