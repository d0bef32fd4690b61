"""Joining a study from a home of its own: rebuilt as it was, or refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

from core.data.split import Split
from core.data.table import Table
from core.errors import InputError
from tuner.drivers.join_home import JoinFlags, second_part, study_here
from tuner.drivers.turns import SharedBudget, publish_budget
from tuner.home import Home
from tuner.preparation import SearchRequest, prepare
from tuner.spaces.space import load_space
from tuner.studies.parts import begin_finetune_study
from tuner.studies.shared_record import RECORD, SPLIT, publish_study, published_record
from tuner.studies.study import Study, create_study

from .two_parts import TWO_PARTS

Refused = Callable[..., str]


class Elsewhere:
    """A study begun in another home, in a database that this one reaches, too."""

    def __init__(self, root: Path, data: Path, space: Path, name: str = "shared") -> None:
        self.root = root
        self.url = f"sqlite:///{root}/optuna.db"
        self.tracking_uri = f"sqlite:///{root}/mlflow.db"
        self.data = data
        request = SearchRequest(
            space=load_space(str(space)),
            data={"data": data, "images": data},
            study=name,
            storage=self.url,
            tracking_uri=self.tracking_uri,
            weights="none",
        )
        self.home = Home(root=root / "there")
        self.home.studies.mkdir(parents=True)
        record, self.table, self.split = prepare(request, self.home, Console(quiet=True))
        self.study: Study = create_study(self.home, record)
        self.split.save(self.study.split_path)
        self.state = self.study.optuna(new=True)

    def publish(self) -> None:
        publish_study(self.study, self.split)


@pytest.fixture
def there(tmp_path: Path, data: Path, space: Path) -> Elsewhere:
    there = Elsewhere(tmp_path, data, space)
    there.publish()
    return there


@pytest.fixture
def moved(tmp_path: Path, data: Path) -> Path:
    """The same pictures at another place."""
    return Path(shutil.copytree(data, tmp_path / "moved" / "posters"))


def rebuilt(there: Elsewhere, home: Path, **flags: Any) -> tuple[Study, Table, Split]:
    here = Home(root=home)
    here.studies.mkdir(parents=True, exist_ok=True)
    flags = {"storage": there.url, **flags}
    return study_here("shared", here, Console(quiet=True), JoinFlags(**flags))


def test_a_study_is_rebuilt_in_another_home(there: Elsewhere, home: Path, moved: Path) -> None:
    shutil.rmtree(there.data)
    study, table, split = rebuilt(there, home, data=moved)
    assert study.folder == home / "studies" / "shared"
    assert table.fingerprint() == there.table.fingerprint()
    assert [p.parent for p in table.paths] == [moved] * table.num_images
    for part in ("train", "validation", "test"):
        assert np.array_equal(getattr(split, part), getattr(there.split, part))
    before, after = there.study.record, study.record
    assert after.data == {"data": str(moved), "images": "."}
    assert (after.space, after.seed, after.trials) == (before.space, before.seed, before.trials)
    assert (after.storage, after.tracking_uri) == (there.url, there.tracking_uri)
    assert study.optuna()._study_id == there.state._study_id
    # The second time it is there.
    again, _, split = rebuilt(there, home, data=moved)
    assert again.record == after
    assert np.array_equal(split.test, there.split.test)


def test_passwords_are_not_published(there: Elsewhere) -> None:
    uri = "http://me:hunter2@127.0.0.1:1"
    record = dataclasses.replace(there.study.record, name="guarded", tracking_uri=uri)
    study = create_study(there.home, record)
    publish_study(study, there.split)
    attributes = study.optuna().user_attrs
    assert study.tracking_uri() == uri
    assert attributes[RECORD]["tracking_uri"] == "http://127.0.0.1:1"
    assert "hunter2" not in json.dumps(attributes)
    assert len(attributes[SPLIT]) == 64


def test_a_record_is_published_once(there: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr(
        optuna.Study, "set_user_attr", lambda self, name, value: writes.append(name)
    )
    there.publish()
    assert not writes
    there.split = Split(**{**vars(there.split), "seed": 1, "test": there.split.validation})
    there.publish()
    assert writes == [SPLIT]


def test_a_record_of_another_version_is_refused(there: Elsewhere) -> None:
    record = there.state.user_attrs[RECORD]
    there.state.set_user_attr(RECORD, {**record, "format": 99})
    with pytest.raises(InputError, match=r"--storage x: format 99 is not 1"):
        published_record(there.state, where="--storage x")
    there.state.set_user_attr(RECORD, {**record, "colour": "red"})
    with pytest.raises(InputError, match=r"entries that are unknown here: \['colour'\]"):
        published_record(there.state, where="--storage x")


def test_a_study_that_is_not_here_needs_its_storage(refused: Refused) -> None:
    refused("join", "shared", says=("there is no study 'shared' in this home", "--storage URL"))


def test_a_study_that_is_not_in_the_storage(there: Elsewhere, refused: Refused) -> None:
    storage = ("--storage", there.url)
    refused("join", "other", *storage, says=("there is no study 'other'", "there are: shared"))


def test_a_study_that_has_not_begun(
    tmp_path: Path, data: Path, space: Path, refused: Refused
) -> None:
    there = Elsewhere(tmp_path, data, space)
    refused(
        "join", "shared", "--storage", there.url, says=("shared has not begun", "resume shared")
    )


def test_no_driver_and_no_trials(there: Elsewhere, refused: Refused, moved: Path) -> None:
    says = ("its trials have not begun, and no driver prepares them", "tuner resume shared")
    refused("join", "shared", "--storage", there.url, "--data", moved, says=says, writes=True)


def test_other_pictures_are_refused(there: Elsewhere, refused: Refused, moved: Path) -> None:
    shutil.copyfile(moved / "3.png", moved / "5.png")
    says = (str(moved), "not the data that the study began with", "--data DIR")
    refused("join", "shared", "--storage", there.url, "--data", moved, says=says)


def test_another_split_is_refused(there: Elsewhere, refused: Refused) -> None:
    there.state.set_user_attr(SPLIT, "0" * 64)
    says = ("split in another way here", "the same version")
    refused("join", "shared", "--storage", there.url, says=says)


def test_another_mlflow_is_refused(
    there: Elsewhere, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written to it."""
    import contextlib

    import tuner.drivers.joining

    publish_budget(there.state, SharedBudget(trials=2))
    monkeypatch.setattr(tuner.drivers.joining, "cluster", lambda _: contextlib.nullcontext())
    uri = f"sqlite:///{tmp_path}/other.db"
    says = ("this MLflow has no run of shared", "name the MLflow that the first driver writes to")
    refused("join", "shared", "--storage", there.url, "--tracking-uri", uri, says=says, writes=True)
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--storage", "sqlite:///other.db"),
        ("--weights", "."),
        ("--data", "elsewhere"),
        ("--tracking-uri", "http://127.0.0.1:1"),
    ],
)
def test_flags_that_contradict_the_study_in_this_home(
    there: Elsewhere, home: Path, refused: Refused, flag: str, value: str
) -> None:
    rebuilt(there, home)
    says = (flag, "the study in this home has another", "leave the flag out")
    refused("join", "shared", flag, value, says=says, writes=True)


def test_the_second_part_is_rebuilt_once_it_has_begun(
    tmp_path: Path, data: Path, home: Path
) -> None:
    space = tmp_path / "both.yaml"
    space.write_text(TWO_PARTS)
    there = Elsewhere(tmp_path, data, space)
    there.publish()
    study, *_ = rebuilt(there, home)
    here = Home(root=home)
    assert second_part(here, study) is None
    begun = begin_finetune_study(there.home, there.study, [])
    begun.optuna(new=True)
    assert second_part(here, study) is None
    publish_study(begun, there.split)
    found = second_part(here, study)
    assert found is not None
    assert found.folder == home / "studies" / "shared-finetune"
    assert found.record.after == "shared" and found.record.space == begun.record.space
    assert Split.load(found.split_path, there.table).ids == there.table.ids
    again = second_part(here, study)
    assert again is not None and again.record == found.record
    with pytest.raises(InputError, match="it is the second part of shared"):
        study_here("shared-finetune", here, Console(quiet=True), JoinFlags())
    other = Home(root=tmp_path / "third")
    other.studies.mkdir(parents=True)
    with pytest.raises(InputError, match="it is the second part of shared"):
        study_here("shared-finetune", other, Console(quiet=True), JoinFlags(storage=there.url))
    assert not list(other.studies.iterdir())
