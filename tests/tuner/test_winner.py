"""How a study is asked to end, and how MLflow tells which trial won."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from core.report import Outcome, Status
from tuner.finalists.crown import AS_USUAL, FinalistOptions
from tuner.finalists.winner import best_candidates
from tuner.home import open_home
from tuner.spaces.space import load_space
from tuner.studies.study import StudyRecord, TrialRecord, create_study, open_study
from tuner.tracking.tracker import Tracker
from tuner.trials.context import request_of


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--finalists", "0"], "--finalists: at least 1 must hold, but got 0"),
        (["--seeds", "0"], "--seeds: at least 1 must hold"),
        (["--ensemble", "1"], "--ensemble: at least 2 must hold"),
        (["--ensemble", "4", "--seeds", "1"], "--ensemble: an ensemble is judged by seeds"),
    ],
)
def test_what_cannot_be_asked_for(
    flags: list[str], message: str, tuner: Callable[..., Any], data: Path, space: Path
) -> None:
    ended = tuner("search", space, "--data", data, *flags)
    assert ended.code == 2
    assert message in ended.err


def test_a_dry_run_takes_the_flags(
    tuner: Callable[..., Any], data: Path, space: Path, home: Path
) -> None:
    flags = ("--finalists", "2", "--seeds", "4", "--refit", "--ensemble", "3")
    ended = tuner("search", space, "--data", data, "--dry-run", *flags)
    assert ended.code == 0, ended.err


def _record(space: Path, **changes: Any) -> StudyRecord:
    return StudyRecord(
        name="mine",
        space=load_space(space).to_dict(),
        data={},
        skipped=(),
        fingerprint="f",
        num_folds=None,
        seed=0,
        trials=2,
        storage=None,
        tracking_uri="sqlite:///x",
        model="m",
        weights="none",
        weights_dir=None,
        **changes,
    )


def test_a_study_remembers_the_order_of_its_parameters(home: Path, tmp_path: Path) -> None:
    """A sampler draws them in that order: in another one a resumed study would propose others."""
    path = tmp_path / "ordered.yaml"
    path.write_text(
        "trials: 2\nparameters: {weight_decay: {low: 0.1, high: 1}, backbone: ffn, head: linear,"
        " loss: [bce, focal], gamma: {when: {loss: focal}, low: 1, high: 2}, dropout: [0, 0.5]}\n"
    )
    place = open_home(home)
    create_study(place, _record(path))
    assert list(open_study(place, "mine").space().parameters) == list(load_space(path).parameters)


def test_a_study_remembers_how_it_is_to_end(home: Path, space: Path) -> None:
    options = FinalistOptions(count=2, seeds=4, refit=True, ensemble=3)
    place = open_home(home)
    create_study(place, _record(space, finalists=dataclasses.asdict(options)))
    found = open_study(place, "mine").record.finalists
    assert FinalistOptions(**found) == options
    assert FinalistOptions(**(found | {"refit": False})).refit is False


def test_a_study_from_before_ends_as_usual(home: Path, space: Path) -> None:
    place = open_home(home)
    study = create_study(place, _record(space))
    values = json.loads((study.folder / "study.json").read_text())
    del values["finalists"]
    (study.folder / "study.json").write_text(json.dumps(values))
    assert FinalistOptions(**open_study(place, "mine").record.finalists) == AS_USUAL


def _trial(number: int, value: float | None, status: Status = Status.COMPLETE) -> TrialRecord:
    return TrialRecord(
        number=number,
        status=status.value,
        reason="",
        value=value,
        best_epoch=1,
        epochs=1,
        seconds=1.0,
        settings={"backbone": "ffn", "lr": 0.01 * (number + 1)},
    )


def test_candidates_are_the_best_complete_trials_of_their_study() -> None:
    trials = [
        _trial(0, 0.4),
        _trial(1, 0.9, Status.PRUNED),
        _trial(2, 0.7),
        _trial(3, 0.7),
        _trial(4, 0.8),
        _trial(5, None, Status.INFEASIBLE),
    ]
    features = {request_of(_config()): "folder"}
    found = best_candidates(trials, features, 2, study="s", count=3)
    assert [(c.number, c.label) for c in found] == [(4, "s/4"), (2, "s/2"), (3, "s/3")]
    assert [c.config.lr for c in found] == pytest.approx([0.05, 0.03, 0.04])
    assert len({c.config.seed for c in found}) == 3
    assert found[0].features == {"plain": "folder"}
    assert len(best_candidates(trials, features, 2, study="s")) == 4


def _config() -> Any:
    from core.config import TrialConfig

    return TrialConfig(backbone="ffn")


def test_one_trial_of_both_parts_is_marked_as_the_winner(tmp_path: Path) -> None:
    """And no longer the one that won before there were more trials."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    trackers = {
        name: Tracker(
            uri,
            experiment="e",
            artifacts=tmp_path,
            study=name,
            objective="top3_accuracy",
            floor=0.0,
        )
        for name in ("s", "s-finetune")
    }
    for tracker in trackers.values():
        tracker.start_study({})
        for number in range(2):
            tracker.trial_ended(number, {}, Outcome(status=Status.COMPLETE, best_value=0.5))
        tracker.flush()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e").experiment_id

    def marked() -> list[tuple[str, str]]:
        runs = client.search_runs([experiment], "tags.`tuner.winner` = 'true'")
        return [(run.data.tags["tuner.study"], run.data.tags["tuner.trial"]) for run in runs]

    second = trackers["s-finetune"]
    for number, study, expected in (
        (1, None, [("s-finetune", "1")]),
        (0, "s-finetune", [("s-finetune", "0")]),
    ):
        second.mark_winner(number, study)
        second.flush()
        assert marked() == expected
    trackers["s"].mark_winner(1)
    trackers["s"].flush()
    second.mark_winner(0, "s")
    second.flush()
    assert marked() == [("s", "0")]
    for tracker in trackers.values():
        tracker.close()
