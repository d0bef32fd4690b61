"""A two-part study of several objectives ends in one Pareto front over both parts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from core.report import Outcome, Status
from tuner.goals.costs import Shape, keep_costs, read_costs, shapes_of, share_costs, unmeasured
from tuner.goals.pareto import joint_front
from tuner.goals.pareto_view import NUMBERS, PICTURE, record_front
from tuner.home import Home, open_home
from tuner.session import _up_to
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.parts import begin_finetune_study
from tuner.studies.study import Study, StudyRecord, TrialRecord, create_study
from tuner.trials.telling import tell
from tuner.views.summary import _print_front, print_trials

pytestmark = pytest.mark.usefixtures("quiet_optuna")

PARAMETERS = {"backbone": "squeezenet1_1", "image_size": 32, "lr": {"low": 0.01, "high": 1}}
VALUES: dict[str, Any] = {
    "name": "both",
    "objectives": ["top3_accuracy", "latency_ms"],
    "probe": {"trials": 3, "parameters": {**PARAMETERS, "epochs": 2}},
    "finetune": {
        "trials": 3, "sampler": "random",
        "parameters": {
            **PARAMETERS, "image_size": [32, 64], "unfrozen_stages": 1, "epochs": 2,
        },
    },
}  # fmt: skip
PROBES = [(0.5, 10.0), (0.4, 5.0), (0.3, 9.0)]
"""(score, latency): the third is behind the second."""
TUNED = [(0.55, 10.0), (0.6, 30.0), (0.35, 5.0)]
"""The first is before the best probe; the third behind a probe."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def parts(home: Home) -> list[Study]:
    """Both parts, with trials of these scores and latencies."""
    space = parse_space(VALUES)
    record = StudyRecord(
        name="both", space=space.to_dict(), data={}, skipped=(), fingerprint="f", num_folds=None,
        seed=0, trials=3, finetune_trials=3, storage=None, tracking_uri="sqlite:///none.db",
        model="m", weights="none", weights_dir=None,
    )  # fmt: skip
    probes = create_study(home, record)
    probes.split_path.write_text("{}")
    tuned = begin_finetune_study(home, probes, [])
    for study, ends in ((probes, PROBES), (tuned, TUNED)):
        _add_trials(study, ends)
    return [probes, tuned]


def _add_trials(study: Study, ends: list[tuple[float, float]]) -> None:
    space, state = study.space(), study.optuna(new=True)
    for score, latency in ends:
        trial = state.ask()
        space.suggest(trial)
        outcome = Outcome(
            status=Status.COMPLETE, best_value=score, best_epoch=1,
            best_metrics={"latency_ms": latency, "size_mb": 1.0},
        )  # fmt: skip
        tell(state, trial, outcome, space)


class Tracker:
    def __init__(self) -> None:
        self.marked: dict[str, list[int]] = {}
        self.files: list[Path] = []

    def mark_front(self, numbers: list[int], study: str) -> None:
        self.marked[study] = numbers

    def log_artifacts(self, files: list[Path]) -> None:
        self.files = files


def test_the_joint_front_is_that_of_all_trials_together() -> None:
    """The oracle: no other trial, of either part, is better in one and no worse in both."""
    random = np.random.default_rng(0)
    space = parse_space(VALUES)
    for _ in range(20):
        scores = random.integers(0, 6, (2, 12)) / 10
        latencies = random.integers(1, 6, (2, 12)).astype(float)
        trials = [
            (name, [_record(n, scores[part, n], latencies[part, n]) for n in range(12)])
            for part, name in enumerate(("a", "b"))
        ]
        every = [(scores[p, n], -latencies[p, n]) for p in range(2) for n in range(12)]
        expected = {
            ("ab"[place // 12], place % 12)
            for place, own in enumerate(every)
            if not any(o != own and o[0] >= own[0] and o[1] >= own[1] for o in every)
        }
        found = joint_front(trials, space)
        assert {(name, trial.number) for name, trial in found} == expected
        values = [trial.value for _, trial in found]
        assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    alone = joint_front([("a", [_record(0, 0.5, 1.0)]), ("b", [])], space)
    assert [(name, trial.number) for name, trial in alone] == [("a", 0)]
    equal = joint_front([("a", [_record(1, 0.5, 1.0)]), ("b", [_record(0, 0.5, 1.0)])], space)
    assert [name for name, _ in equal] == ["a", "b"]


def _record(number: int, score: float, latency: float) -> TrialRecord:
    return TrialRecord(
        number=number, status="complete", reason="", value=float(score), best_epoch=1, epochs=1,
        seconds=1.0, settings={}, metrics={"latency_ms": float(latency)},
    )  # fmt: skip


def test_it_is_recorded_with_the_second_part_and_tagged_in_both(
    parts: list[Study], home: Home
) -> None:
    probes, tuned = parts
    tracker: Any = Tracker()
    assert [study.record.name for study in _up_to(tuned, home)] == ["both", "both-finetune"]
    record_front(_up_to(probes, home), probes.space(), tracker)
    assert tracker.marked == {"both": [0, 1]}, "the first part alone, before there is a second"
    assert json.loads((probes.folder / NUMBERS).read_text())[0] == {
        "trial": 0, "top3_accuracy": 0.5, "latency_ms": 10.0,
    }  # fmt: skip
    record_front(_up_to(tuned, home), tuned.space(), tracker)
    assert tracker.marked == {"both": [1], "both-finetune": [1, 0]}
    rows = json.loads((tuned.folder / NUMBERS).read_text())
    assert [(row["study"], row["trial"]) for row in rows] == [
        ("both-finetune", 1), ("both-finetune", 0), ("both", 1),
    ]  # fmt: skip
    assert tracker.files == [tuned.folder / NUMBERS, tuned.folder / PICTURE]
    with Image.open(tuned.folder / PICTURE) as picture:
        assert picture.width > 100


def test_the_end_shows_it_once_with_names_that_can_be_picked(parts: list[Study]) -> None:
    stream = StringIO()
    console = Console(file=stream, width=200)
    _print_front(parts, console)
    text = stream.getvalue()
    assert text.count("Pareto front of both parts") == 1
    places = [text.index(label) for label in ("both-finetune/1", "both-finetune/0", "both/1")]
    assert places == sorted(places) and "both/0" not in text
    assert "tuner resume both --pick TRIAL" in text
    assert str(parts[1].folder / PICTURE) in text
    alone = StringIO()
    _print_front(parts[:1], Console(file=alone, width=200))
    text = alone.getvalue()
    assert "Pareto front" in text and "of both parts" not in text and "both/1" not in text


def test_a_list_of_trials_marks_the_joint_front(
    parts: list[Study], capsys: pytest.CaptureFixture[str]
) -> None:
    print_trials(parts, Console(), as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    on_front = {(row["study"], row["number"]) for row in rows if row["front"]}
    assert on_front == {("both", 1), ("both-finetune", 0), ("both-finetune", 1)}


def test_one_kind_of_model_has_one_latency_in_both_parts(parts: list[Study]) -> None:
    """Measured anew it would differ by chance, and one part would seem to be quicker."""
    probes, tuned = parts
    space: SearchSpace = tuned.space()
    (mine,) = shapes_of(probes.space())
    keep_costs(probes.optuna(), {mine: {"latency_ms": 7.0, "size_mb": 3.0}})
    assert mine in shapes_of(space) and len(unmeasured(tuned.optuna(), space)) == 2
    share_costs(probes.optuna(), tuned.optuna(), space)
    left: list[Shape] = unmeasured(tuned.optuna(), space)
    assert [shape.image_size for shape in left] == [64]
    assert read_costs(tuned.optuna())[mine] == {"latency_ms": 7.0, "size_mb": 3.0}
    keep_costs(probes.optuna(), {mine: {"latency_ms": 9.0, "size_mb": 3.0}})
    share_costs(probes.optuna(), tuned.optuna(), space)
    assert read_costs(tuned.optuna())[mine]["latency_ms"] == 7.0, "what is known stays"
