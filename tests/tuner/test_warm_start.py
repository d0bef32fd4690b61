"""Which trials of earlier studies are first points of a new one, and which are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

from core.config import TrialConfig
from core.data.split import make_split
from core.data.table import Table
from core.errors import InputError
from core.report import Outcome, Status
from tuner.home import Home, open_home
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.study import OUTCOME, Study, StudyRecord, create_study, outcome_attribute
from tuner.studies.warm_start import (
    FILE,
    WarmStart,
    continues,
    read_sources,
    warm_start,
    warm_start_of,
    warm_start_text,
)

PARAMETERS: dict[str, Any] = {
    "backbone": ["squeezenet1_1", "mobilenet_v2"],
    "head": ["linear", "mlp"],
    "hidden_sizes": {"when": {"head": "mlp"}, "choice": [[256], [512]]},
    "optimizer": ["sgd", "adamw"],
    "lr": {"low": 1e-4, "high": 10, "log": True},
    "label_smoothing": [0.0, 0.2],
    "batch_size": [64, 256],
    "epochs": 30,
}
BEST = {
    "backbone": "mobilenet_v2", "head": "mlp", "hidden_sizes": [256], "optimizer": "adamw",
    "lr": 0.01, "label_smoothing": 0.0, "batch_size": 64,
}  # fmt: skip


def space(mode: str = "probe", **other: Any) -> SearchSpace:
    parameters = {k: v for k, v in {**PARAMETERS, **other}.items() if v is not None}
    return parse_space({"name": "s", "mode": mode, "parameters": parameters})


def study_with(
    home: Home,
    name: str,
    trials: list[tuple[dict[str, Any], float | None]],
    searched: SearchSpace | None = None,
    **record: Any,
) -> Study:
    """A study whose trials had these settings and ended with these values; None: pruned."""
    searched = searched or space()
    values: dict[str, Any] = {
        "name": name, "space": searched.to_dict(), "data": {}, "skipped": (), "fingerprint": "f",
        "num_folds": None, "seed": 0, "trials": 9, "storage": None, "tracking_uri": "sqlite://",
        "model": "m", "weights": "none", "weights_dir": None,
    }  # fmt: skip
    study = create_study(home, StudyRecord(**values | record))
    asked = study.optuna(sampler=optuna.samplers.RandomSampler(seed=1))
    for settings, value in trials:
        asked.enqueue_trial(searched.to_params(settings))
        trial = asked.ask()
        searched.suggest(trial)
        status = Status.PRUNED if value is None else Status.COMPLETE
        outcome = Outcome(status=status, best_value=value or 0.9, best_epoch=1)
        trial.set_user_attr(OUTCOME, outcome_attribute(outcome))
        if value is None:
            asked.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            asked.tell(trial, value)
    return study


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def points_of(started: WarmStart) -> list[tuple[str, int]]:
    return [(point.study, point.number) for point in started.points]


def test_the_best_complete_trials_come_first_and_give_the_same_training(home: Home) -> None:
    trials = [({**BEST, "lr": lr}, value) for lr, value in ((0.1, 0.4), (0.2, 0.6), (0.3, 0.5))]
    study = study_with(home, "old", [*trials, ({**BEST, "lr": 0.4}, None)])
    own = {"backbone": "squeezenet1_1", "lr": 1.0}
    new = parse_space({"name": "s", "parameters": PARAMETERS, "points": [own]})
    started = warm_start(new, [study], 2)
    assert points_of(started) == [("old", 1), ("old", 2)]
    assert [point["lr"] for point in started.space.points] == [0.2, 0.3, 1.0], "then the space's"
    assert started.points[0].changed == () and started.num_misfits == 0
    for point, (settings, _) in zip(started.points, (trials[1], trials[2]), strict=True):
        # Through Optuna and back: the very training of that trial, whatever the sampler.
        asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
        asked.enqueue_trial(started.space.to_params(point.point))
        again = TrialConfig.from_dict(started.space.suggest(asked.ask()))
        assert again == TrialConfig.from_dict({**settings, "epochs": 30})
    # And the study that is kept reads its points back.
    assert parse_space(started.space.to_dict(), name="s").points == started.space.points


def test_what_does_not_fit_is_counted_by_the_setting_to_blame(home: Home) -> None:
    study = study_with(
        home,
        "old",
        [
            (BEST, 0.5),
            ({**BEST, "lr": 5.0}, 0.9),  # Outside the new range.
            ({**BEST, "lr": 5.0, "batch_size": 256}, 0.8),
            ({**BEST, "backbone": "squeezenet1_1"}, 0.7),  # Not there any more.
            ({**BEST, "hidden_sizes": [512]}, 0.6),
        ],
    )
    new = space(
        backbone=["mobilenet_v2"],
        lr={"low": 1e-4, "high": 1, "log": True},
        batch_size=[64, 128],
        hidden_sizes={"when": {"head": "mlp"}, "choice": [[256], [1024]]},
    )
    started = warm_start(new, [study], 10)
    assert points_of(started) == [("old", 0)]
    assert started.misfits == {"lr": 2, "batch_size": 1, "backbone": 1, "hidden_sizes": 1}
    assert (started.num_complete, started.num_misfits) == (5, 4)
    text = warm_start_text(started)
    assert "trial 0 of old" in text
    assert "4 of 5 complete trials do not fit (lr 2x, batch_size 1x" in text


def test_what_the_new_space_fixes_is_as_it_says(home: Home) -> None:
    """A shorter training, and a parameter that is no longer searched."""
    study = study_with(home, "old", [({**BEST, "label_smoothing": 0.2}, 0.5), (BEST, 0.4)])
    started = warm_start(space(epochs=5, label_smoothing=None), [study], 10)
    (point,) = started.points  # Without smoothing the two are the same point.
    assert point.number == 0 and set(point.changed) == {"epochs", "label_smoothing"}
    assert "label_smoothing" not in point.point and "epochs" not in point.point
    assert "epochs 1x" in warm_start_text(started)
    # What is new in the space is as that trial had it, where the space allows that.
    wider = space(dropout={"low": 0.0, "high": 0.5}, loss=["bce", "focal"], gamma=None)
    (first, *_) = warm_start(wider, [study], 1).points
    assert first.point["dropout"] == 0.0 and first.point["loss"] == "bce"


@pytest.mark.parametrize(
    ("settings", "other", "blamed"),
    [
        (BEST, {"head": "linear", "hidden_sizes": None}, "head 1x"),
        (BEST, {"optimizer": "sgd"}, "optimizer 1x"),
        # A parameter that is left out has its default: linear, adamw.
        (BEST, {"head": None, "hidden_sizes": None}, "head 1x"),
        ({**BEST, "optimizer": "sgd"}, {"optimizer": None}, "optimizer 1x"),
    ],
)
def test_another_head_or_optimizer_is_another_thing(
    home: Home, settings: dict[str, Any], other: dict[str, Any], blamed: str
) -> None:
    study = study_with(home, "old", [(settings, 0.5)])
    with pytest.raises(InputError, match=r"--from-study: no trial of old.*do not fit \(") as error:
        warm_start(space(**other), [study], 3)
    assert blamed in str(error.value)


def test_a_study_whose_trials_are_gone_says_so(home: Home) -> None:
    study = study_with(home, "old", [(BEST, 0.5)])
    (study.folder / "journal.log").unlink()
    study._storage = None
    with pytest.raises(InputError, match="--from-study old: its trials are not in its storage"):
        warm_start(space(), [study], 3)


def test_several_studies_take_turns(home: Home) -> None:
    """Values of two studies cannot be compared: those of one must not push out the other's."""
    high = [({**BEST, "lr": lr}, 0.9) for lr in (0.1, 0.2, 0.3)]
    low = [({**BEST, "lr": lr}, 0.1) for lr in (0.1, 0.5)]
    studies = [study_with(home, "a", high), study_with(home, "b", low)]
    started = warm_start(space(), studies, 3)
    # b's best is a's best once more, so it gives its second.
    assert points_of(started) == [("a", 0), ("a", 1), ("b", 1)]
    with pytest.raises(InputError, match="--from-trials"):
        warm_start(space(), studies, 0)


def test_each_part_of_a_two_part_space_has_its_own(home: Home) -> None:
    probes = study_with(home, "old", [(BEST, 0.5)], finetune_trials=4)
    tuned = space("finetune", unfrozen_stages=[1, 2])
    study_with(
        home, "old-finetune", [({**BEST, "unfrozen_stages": 2}, 0.6)], tuned, after="old"
    )  # fmt: skip
    new = parse_space(
        {
            "name": "two",
            "probe": {"parameters": PARAMETERS},
            "finetune": {"parameters": {**PARAMETERS, "unfrozen_stages": [1, 2, 3]}},
        }
    )
    sources = read_sources(home, ["old"])
    assert [s.record.name for s in sources] == ["old", "old-finetune"]
    started = warm_start(new, sources, 5)
    assert new.finetune is not None and started.space.finetune is not None
    assert [p["lr"] for p in started.space.points] == [0.01]
    (point,) = started.space.finetune.points
    assert point["unfrozen_stages"] == 2
    # Of a space with one part, the other part's trials are counted as of another mode.
    assert warm_start(space(), sources, 5).misfits == {"mode": 1}
    assert probes.record.name == "old"


def test_a_study_is_named_or_is_a_folder_anywhere(tmp_path: Path, home: Home) -> None:
    other = open_home(tmp_path / "other")
    there = study_with(other, "far", [(BEST, 0.5)])
    study_with(home, "near", [({**BEST, "lr": 0.3}, 0.5)])
    found = read_sources(home, ["near", str(there.folder), "near"])
    assert [study.folder for study in found] == [home.studies / "near", there.folder]
    assert points_of(warm_start(space(), found, 5)) == [("near", 0), ("far", 0)]
    for wrong in ("far", str(tmp_path)):
        with pytest.raises(InputError, match=f"--from-study {wrong}: no study can be read"):
            read_sources(home, [wrong])
    assert warm_start_of(home, space(), (), 5) is None


def test_nothing_but_settings_is_taken(home: Home) -> None:
    """No value, no trial: the new study begins empty, whatever the old one holds."""
    study = study_with(home, "old", [(BEST, 0.99)])
    before = (study.folder / "journal.log").read_bytes()
    started = warm_start(space(), [study], 1)
    assert (study.folder / "journal.log").read_bytes() == before
    text = json.dumps(started.space.to_dict())
    assert "0.99" not in text


def test_a_study_that_could_be_resumed_is_named(home: Home, tmp_path: Path) -> None:
    targets = np.eye(4, dtype=np.uint8)[np.arange(60) % 4]
    paths = tuple(tmp_path / f"{i}.png" for i in range(60))
    for row, path in enumerate(paths):
        path.write_bytes(bytes([row]))
    table = Table(
        name="t", root=tmp_path, ids=tuple(str(i) for i in range(60)), paths=paths,
        targets_NC=targets, class_names=("a", "b", "c", "d"),
    )  # fmt: skip
    groups = list(range(60))
    split, other = (make_split(table, seed=seed, groups=groups) for seed in (0, 1))
    study = study_with(home, "old", [(BEST, 0.5)], fingerprint=table.fingerprint())
    split.save(study.split_path)
    assert continues([study], space(), table, split) == "old"
    assert continues([study], space(), table, other) == "", "another split"
    assert continues([study], space(epochs=5), table, split) == "", "another space"
    assert continues([study], space(), table.select(range(59)), split) == "", "another table"
    console = Console(record=True, width=200)
    folder = home.studies / "new"
    folder.mkdir()
    warm_start(space(), [study], 1).announce(folder, table, split, console)
    said = console.export_text()
    assert "the settings of trial 0 of old" in said and "tuner resume old --trials MORE" in said
    (kept,) = json.loads((folder / FILE).read_text())
    assert (kept["study"], kept["number"], kept["value"]) == ("old", 0, 0.5)
