"""Studies of several objectives: fronts, stopping by fronts, samplers, tables, choosing."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console

from core.config import TrialConfig
from core.errors import InputError
from core.report import Outcome, Status
from tuner.finalists.choice import check_choice, chosen
from tuner.finalists.crown import FinalistOptions
from tuner.goals.costs import ATTRIBUTE
from tuner.goals.pareto import front, layers
from tuner.goals.pareto_view import draw_front, front_table
from tuner.home import open_home
from tuner.sampling.pareto_pruning import FrontPruner, report, reported, should_stop
from tuner.sampling.pruners import build_pruner
from tuner.sampling.samplers import SAMPLERS, build_sampler
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.study import Study, StudyRecord, TrialRecord, create_study, trial_records
from tuner.trials.telling import tell
from tuner.views.summary import print_trials

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def _space(*costs: str, **changes: Any) -> SearchSpace:
    values: dict[str, Any] = {
        "name": "front",
        "objectives": ["top3_accuracy", *costs],
        "trials": 60,
        "sampler": {"name": "tpe", "startup_trials": 10},
        "parameters": {
            "backbone": list(LATENCY),
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "epochs": 9,
        },
    }
    return parse_space(values | changes)


LATENCY = {"ffn": 1.0, "squeezenet1_1": 5.0, "resnet18": 20.0, "resnet34": 40.0}
SCORE = {"ffn": 0.3, "squeezenet1_1": 0.5, "resnet18": 0.45, "resnet34": 0.6}
"""resnet18 is dominated by squeezenet1_1."""


# ---- fronts -------------------------------------------------------------------------------------


def _dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a >= b).all() and (a > b).any())


def _layers_by_definition(points: np.ndarray) -> list[int]:
    found: dict[int, int] = {}
    while len(found) < len(points):
        left = [i for i in range(len(points)) if i not in found]
        layer = max(found.values(), default=-1) + 1
        for i in left:
            if not any(_dominates(points[j], points[i]) for j in left):
                found[i] = layer
    return [found[i] for i in range(len(points))]


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
@pytest.mark.parametrize("num_values", [3, 1000])  # with ties and equal rows, and without
def test_layers_are_those_of_the_definition(num_objectives: int, num_values: int) -> None:
    rng = np.random.default_rng(num_objectives)
    points = rng.integers(0, num_values, (60, num_objectives)).astype(float)
    expected = _layers_by_definition(points)
    assert layers(points.tolist()) == expected
    for enough in (1, 20):
        found = layers(points.tolist(), enough=enough)
        last = max(found)
        assert [min(layer, last) for layer in expected] == found
        assert last == max(expected) or sum(layer < last for layer in found) >= enough
    assert layers([]) == []


def _trial(number: int, value: float | None, status: str = "complete", **costs: float) -> Any:
    return TrialRecord(
        number=number,
        status=status,
        reason="too slow" if status == "infeasible" else "",
        value=value,
        best_epoch=1,
        epochs=1,
        seconds=1.0,
        settings={"backbone": "ffn", "lr": 0.01},
        metrics=dict(costs),
    )


TRIALS = [
    _trial(0, 0.5, latency_ms=10.0, size_mb=1.0),
    _trial(1, 0.6, latency_ms=20.0, size_mb=1.0),
    _trial(2, 0.6, latency_ms=30.0, size_mb=0.5),
    _trial(3, 0.4, latency_ms=15.0, size_mb=2.0),
    _trial(4, 0.5, latency_ms=10.0, size_mb=1.0),
    _trial(5, 0.9, "pruned", latency_ms=1.0, size_mb=0.1),
    _trial(6, 0.9, "infeasible", latency_ms=1.0, size_mb=0.1),
    _trial(7, None, "infeasible", latency_ms=99.0, size_mb=0.1),
]


def test_the_front_is_of_complete_trials_best_first() -> None:
    assert [t.number for t in front(TRIALS, _space("latency_ms"))] == [1, 0, 4]
    assert [t.number for t in front(TRIALS, _space("latency_ms", "size_mb"))] == [1, 2, 0, 4]
    assert [t.number for t in front(TRIALS, _space())] == [1, 2], "of one objective, the best"
    assert front([], _space("latency_ms")) == []


def test_the_front_as_people_see_it(tmp_path: Path) -> None:
    for costs, width in ((("latency_ms",), 1), (("latency_ms", "size_mb"), 2)):
        space = _space(*costs)
        best = front(TRIALS, space)
        table = front_table(best, space)
        assert [str(c.header) for c in table.columns[2 : 2 + width]] == list(costs)
        assert list(table.columns[0].cells) == [str(t.number) for t in best]
        path = tmp_path / "front.png"
        draw_front(path, TRIALS, best, space)
        with Image.open(path) as picture:
            assert picture.width == width * picture.height * 4 // 3
            colours = {c for _, c in picture.convert("RGB").getcolors(1 << 20) or []}
        assert len(colours) > 50, "an empty picture"


# ---- stopping -----------------------------------------------------------------------------------


def _study(space: SearchSpace, seed: int = 0) -> optuna.Study:
    return optuna.create_study(
        directions=["maximize", *("minimize" for _ in space.minimised)],
        sampler=build_sampler(space.sampler, space, seed),
        pruner=build_pruner(space.pruner, space.max_epochs, minimised=space.minimised),
    )


@pytest.mark.parametrize("factor", [2, 3])
def test_stops_whom_the_definition_stops(factor: int) -> None:
    """Cohorts report together; a place is a front's, then a value's."""
    rng = np.random.default_rng(factor)
    pruner = FrontPruner(rungs=[1, 3], reduction_factor=factor, costs=["latency_ms"])
    study = optuna.create_study(directions=["maximize", "minimize"], pruner=pruner)
    judged = {True: 0, False: 0}
    points: dict[int, dict[int, tuple[float, float]]] = {1: {}, 3: {}, 4: {}}
    for _ in range(8):
        cohort = [study.ask() for _ in range(6)]
        for trial in cohort:
            trial.set_user_attr(ATTRIBUTE, {"latency_ms": float(rng.integers(1, 5))})
        for epoch in (1, 3, 4):
            for trial in cohort:
                value = round(float(rng.random()), 1)
                report(trial, value, epoch)
                points[epoch][trial.number] = (value, -trial.user_attrs[ATTRIBUTE]["latency_ms"])
            there = points[epoch]
            place = dict(
                zip(there, _layers_by_definition(np.array(list(there.values()))), strict=True)
            )
            ranks = {n: (place[n], -value) for n, (value, _) in there.items()}
            stopped = []
            for trial in cohort:
                better = sum(rank < ranks[trial.number] for rank in ranks.values())
                expected = epoch in (1, 3) and better >= max(1, len(ranks) // factor)
                assert should_stop(trial) == expected
                judged[expected] += 1
                if expected:
                    stopped.append(trial)
                    study.tell(trial, state=TrialState.PRUNED)
            cohort = [trial for trial in cohort if trial not in stopped]
        for trial in cohort:
            study.tell(trial, [rng.random(), 1.0])
    assert min(judged.values()) > 10
    with pytest.raises(ValueError, match="reduction_factor >= 2"):
        FrontPruner(rungs=[1], reduction_factor=1, costs=["size_mb"])


def test_the_quickest_are_not_stopped_for_their_score() -> None:
    """By the first objective alone they would be."""
    pruner = FrontPruner(rungs=[1], reduction_factor=3, costs=["latency_ms"])
    study = optuna.create_study(directions=["maximize", "minimize"], pruner=pruner)
    trials = [study.ask() for _ in range(12)]
    for n, trial in enumerate(trials):
        trial.set_user_attr(ATTRIBUTE, {"latency_ms": 1.0 if n % 4 == 0 else 50.0})
        report(trial, (0.2 if n % 4 == 0 else 0.6) + n / 1000, 1)
    going = [n for n, trial in enumerate(trials) if not should_stop(trial)]
    assert going == [4, 8, 10, 11], "the first two of either latency"


def test_reports_go_where_each_kind_of_study_takes_them() -> None:
    one, several = optuna.create_study(), optuna.create_study(directions=["maximize", "minimize"])
    for study in (one, several):
        trial = study.ask()
        report(trial, 0.5, 2)
        report(trial, 0.25, 4)
        assert reported(study.trials[0]) == {2: 0.5, 4: 0.25}
        assert not should_stop(study.ask())
    assert one.trials[0].intermediate_values == {2: 0.5, 4: 0.25}


# ---- searching ----------------------------------------------------------------------------------


def _run(study: optuna.Study, space: SearchSpace, num_trials: int) -> None:
    """Rounds of six, as the searcher runs them."""
    for _ in range(num_trials // 6):
        cohort = {trial: TrialConfig.from_dict(space.suggest(trial)) for trial in _ask(study, 6)}
        for trial, config in cohort.items():
            trial.set_user_attr(ATTRIBUTE, {"latency_ms": LATENCY[config.backbone]})
            report(trial, _value(config), 1)
        for trial, config in cohort.items():
            costs = {"latency_ms": LATENCY[config.backbone]}
            status = Status.PRUNED if should_stop(trial) else Status.COMPLETE
            outcome = Outcome(
                status=status, best_value=_value(config), best_epoch=1, best_metrics=costs
            )
            tell(study, trial, outcome, space)


def _ask(study: optuna.Study, count: int) -> list[optuna.Trial]:
    return [study.ask() for _ in range(count)]


def _value(config: TrialConfig) -> float:
    return SCORE[config.backbone] - 0.1 * abs(np.log10(config.lr) + 2)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", [n for n, kind in SAMPLERS.items() if kind.several_objectives])
def test_every_sampler_that_says_so_searches_for_a_front(name: str) -> None:
    finite = {"backbone": list(LATENCY), "lr": [0.001, 0.01, 0.1], "epochs": 9}
    exhaustive = {"parameters": finite} if name in ("grid", "brute_force") else {}
    few = {"startup_trials": 6} if "startup_trials" in SAMPLERS[name].options.model_fields else {}
    pruner = {"name": "successive_halving", "min_epochs": 1}
    space = _space("latency_ms", sampler={"name": name, **few}, pruner=pruner, **exhaustive)
    study = _study(space)
    _run(study, space, 12)
    states = [trial.state for trial in study.trials]
    assert len(states) == 12 and TrialState.COMPLETE in states and TrialState.PRUNED in states
    records = tuple(trial_records(study, space))
    optunas = {trial.number for trial in study.best_trials}
    assert {trial.number for trial in front(records, space)} == optunas


def test_the_default_sampler_turns_to_the_front() -> None:
    """Backbones of the front, not those that it dominates, and good rates for each; past the bound
    of what the sampler is shown, too."""
    space = _space("latency_ms", pruner="none")
    study = _study(space)
    _run(study, space, 300)
    last = [TrialConfig.from_dict(space.from_params(t.params)) for t in study.trials[-60:]]
    backbones = [config.backbone for config in last]
    assert backbones.count("resnet18") <= 9, "a quarter by chance"
    assert min(backbones.count(name) for name in ("ffn", "squeezenet1_1", "resnet34")) >= 6
    near = sum(abs(np.log10(config.lr) + 2) < 0.5 for config in last)
    assert near >= 30, "a third by chance"


# ---- a study on disk ----------------------------------------------------------------------------


@pytest.fixture
def study(home: Path) -> Study:
    """Seven ended trials: two complete on the front, one dominated, others stopped or refused."""
    space = _space("latency_ms", constraints={"size_mb": 5.0}, pruner="none")
    record = StudyRecord(
        name="mine", space=space.to_dict(), data={}, skipped=(), fingerprint="f", num_folds=None,
        seed=0, trials=9, storage=None, tracking_uri="sqlite:///x", model="m", weights="none",
        weights_dir=None,
    )  # fmt: skip
    made = create_study(open_home(home), record)
    optuna_study = made.optuna(new=True)
    ends: list[tuple[Status, float | None, float]] = [
        (Status.COMPLETE, 0.5, 10.0),
        (Status.COMPLETE, 0.6, 20.0),
        (Status.COMPLETE, 0.55, 25.0),
        (Status.PRUNED, 0.9, 5.0),
        (Status.FAILED, None, 5.0),
        (Status.INFEASIBLE, None, 5.0),
    ]
    for status, value, latency in ends:
        trial = optuna_study.ask()
        space.suggest(trial)
        size = 50.0 if status is Status.INFEASIBLE else 1.0
        costs = {"latency_ms": latency, "size_mb": size}
        reason = "its model takes 50.0 MB" if status is Status.INFEASIBLE else ""
        outcome = Outcome(
            status=status, reason=reason, best_value=value, best_epoch=1, best_metrics=costs
        )
        tell(optuna_study, trial, outcome, space)
    return made


def test_the_study_is_one_of_several_objectives(study: Study) -> None:
    assert study.directions == ("maximize", "minimize")
    found = study.optuna()
    assert [d.name for d in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert found.trials[1].values == [0.6, 20.0]
    assert found.trials[5].constraints["size_mb"] == pytest.approx(9.0)


def test_trials_are_listed_with_costs_and_front(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    print_trials([study], Console(), as_json=True)
    rows = {row["number"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [n for n, row in rows.items() if row["front"]] == [1, 0]
    assert rows[2]["metrics"] == {"latency_ms": 25.0, "size_mb": 1.0}
    assert [rows[n]["value"] for n in range(4)] == [0.5, 0.6, 0.55, 0.9]
    stream = StringIO()
    print_trials([study], Console(file=stream, width=150), as_json=False)
    text = stream.getvalue()
    for part in ("latency_ms", "size_mb", "complete, front", "its model takes 50.0 MB"):
        assert part in text


def _numbers(study: Study, **options: Any) -> list[int]:
    records = list(trial_records(study.optuna(), study.space()))
    return [t.number for t in chosen(records, "mine", FinalistOptions(**options))]


def test_a_person_chooses_among_complete_trials(study: Study) -> None:
    assert _numbers(study) == [0, 1, 2]
    assert _numbers(study, pick="2") == _numbers(study, pick="mine/2") == [2]
    assert _numbers(study, pick="other/2") == []
    assert _numbers(study, max_latency_ms=20.0) == [0, 1]
    assert _numbers(study, max_latency_ms=20.0, max_size_mb=0.5) == []
    for options in ({"pick": "2"}, {"max_latency_ms": 10.0}, {"max_size_mb": 1.0}, {}):
        check_choice([study], FinalistOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pick": "9"}, "--pick: there is no trial 9\n  see: tuner trials mine"),
        ({"pick": "3"}, "--pick: trial 3 is pruned\n  a trial that is complete can be picked"),
        ({"pick": "5"}, "--pick: trial 5 is infeasible: its model takes 50.0 MB"),
        (
            {"max_latency_ms": 3.0},
            "--max-latency-ms: no complete trial has at most 3 ms: the least has 10 (trial 0 of mi",
        ),
    ],
)
def test_a_choice_that_cannot_be_made(options: Any, says: str, study: Study) -> None:
    with pytest.raises(InputError) as caught:
        check_choice([study], FinalistOptions(**options))
    assert says in str(caught.value)


def test_the_same_number_in_both_parts_needs_a_name(study: Study) -> None:
    with pytest.raises(InputError, match=r"2 may be mine/2 or mine/2"):
        check_choice([study, study], FinalistOptions(pick="2"))


def test_costs_that_were_not_measured_choose_nothing(home: Path, study: Study) -> None:
    plain = parse_space({"name": "plain", "parameters": {"backbone": "ffn"}})
    record = dataclasses.replace(study.record, name="plain", space=plain.to_dict())
    other = create_study(open_home(home), record)
    with pytest.raises(InputError, match="has not measured what its models cost"):
        check_choice([other], FinalistOptions(max_size_mb=3.0))
    with pytest.raises(InputError, match="--max-size-mb: it must be positive, but got -1"):
        FinalistOptions(max_size_mb=-1.0)
