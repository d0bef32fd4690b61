"""Passwords in addresses: kept where only their owner reads, and never said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from tuner.addresses import check_tracking, first_line, read_database, without_password
from tuner.home import Home
from tuner.spaces.space import load_space
from tuner.studies.credentials import FILE, full_address, keep_credentials, without_credentials
from tuner.studies.parts import begin_finetune_study, finetune_study
from tuner.studies.study import Study, StudyRecord, create_study, open_study

SECRET = "s3cr%40t/word"
STORAGE = f"postgresql+psycopg2://me:{SECRET}@db.example:5432/optuna?sslmode=require"
TRACKING = "https://me:pass-w0rd@mlflow.example/base"


@pytest.mark.parametrize(
    ("url", "recorded", "shown"),
    [
        (
            STORAGE,
            "postgresql+psycopg2://me@db.example:5432/optuna?sslmode=require",
            "postgresql+psycopg2://me:***@db.example:5432/optuna?sslmode=require",
        ),
        (TRACKING, "https://mlflow.example/base", "https://me:***@mlflow.example/base"),
        ("http://token@host:5000", "http://host:5000", "http://token@host:5000"),
        (
            "postgresql://h/d?user=me&password=abc&sslmode=require",
            "postgresql://h/d?user=me&sslmode=require",
            "postgresql://h/d?user=me&password=***&sslmode=require",
        ),
        ("postgresql://h/d?password=abc", "postgresql://h/d", "postgresql://h/d?password=***"),
        ("postgresql://:abc@h/d", "postgresql://@h/d", "postgresql://:***@h/d"),
        ("postgresql://me@h/d", "postgresql://me@h/d", "postgresql://me@h/d"),
        ("sqlite:////data/a:b@c/d.db", "sqlite:////data/a:b@c/d.db", "sqlite:////data/a:b@c/d.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_forms_of_an_address(url: str, recorded: str, shown: str) -> None:
    assert without_credentials(url) == recorded
    assert without_credentials(recorded) == recorded
    assert without_password(url) == shown


def test_a_message_that_names_an_address_hides_its_password() -> None:
    """As MLflow's client says it, and SQLAlchemy may."""
    error = OSError(f"API request to {TRACKING}/api failed; then {STORAGE} did, too\nmore")
    said = first_line(error)
    assert "pass-w0rd" not in said and SECRET not in said
    assert "me:***@mlflow.example/base/api failed" in said


@pytest.mark.parametrize(
    "url", ["postgresql://me:pass@word@h/d", "http://me:pass@word@h", "http://me:pass/w0rd@h"]
)
def test_a_password_that_ends_early_is_refused_without_being_said(url: str) -> None:
    with pytest.raises(InputError, match="write @ as %40") as raised:
        if url.startswith("http"):
            check_tracking(url)
        else:
            read_database(url, lambda _: None, flag="--storage", nothing=None)
    assert "word" not in str(raised.value).partition("\n")[0].replace("password", "")
    assert "w0rd" not in str(raised.value)


def test_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    keep_credentials(tmp_path, {"storage": None, "tracking_uri": "http://h"})
    assert not list(tmp_path.iterdir())
    keep_credentials(tmp_path, {"storage": STORAGE, "tracking_uri": "http://h"})
    (file,) = tmp_path.iterdir()
    assert file.name == FILE and file.stat().st_mode & 0o777 == 0o600
    recorded = without_credentials(STORAGE)
    assert full_address(tmp_path, "storage", recorded) == STORAGE
    assert full_address(tmp_path, "tracking_uri", "http://h") == "http://h"
    moved = recorded.replace("db.example", "elsewhere")
    assert full_address(tmp_path, "storage", moved) == moved


def _record(name: str, **changes: Any) -> StudyRecord:
    record = StudyRecord(
        name=name, space=load_space("two_stage").to_dict(), data={"data": "d"}, skipped=(),
        fingerprint="f", num_folds=None, seed=0, trials=2, storage=STORAGE, tracking_uri=TRACKING,
        model="m", weights="none", weights_dir=None, finetune_trials=1,
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def test_a_study_records_no_password_and_knows_it(tmp_path: Path) -> None:
    home = Home(root=tmp_path)
    made = create_study(home, _record("mine"))
    for study in (made, open_study(home, "mine")):
        assert study.storage_url() == STORAGE
        assert study.tracking_uri() == TRACKING
        assert SECRET not in str(study.record) and "pass-w0rd" not in str(study.record)
    _check_hidden(made.folder)
    (made.folder / FILE).unlink()
    assert made.storage_url() == without_credentials(STORAGE)


def test_the_second_part_knows_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str | None] = []

    def open_storage(url: str | None, folder: Path) -> object:
        opened.append(url)
        return object()

    monkeypatch.setattr("tuner.studies.study.open_storage", open_storage)
    home = Home(root=tmp_path)
    probes = create_study(home, _record("mine"))
    probes.split_path.write_text("{}")
    begun = begin_finetune_study(home, probes, [])
    found = finetune_study(home, probes)
    assert found is not None
    assert begun.storage_url() == found.storage_url() == STORAGE
    assert begun.storage() is found.storage() is probes.storage(), "opened anew"
    assert opened == [STORAGE]
    _check_hidden(begun.folder)


def test_an_older_record_with_a_password_still_works(tmp_path: Path) -> None:
    home = Home(root=tmp_path)
    folder = create_study(home, _record("mine")).folder
    (folder / FILE).unlink()
    values = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(values | {"storage": STORAGE}))
    assert open_study(home, "mine").storage_url() == STORAGE


def test_journals_of_two_studies_are_not_shared(tmp_path: Path) -> None:
    home = Home(root=tmp_path)
    first = create_study(home, _record("a", storage=None))
    second = create_study(home, _record("b", storage=None))
    second.share_storage(first)
    assert first.storage() is not second.storage()
    assert first.storage() is first.storage()


def _check_hidden(folder: Path) -> None:
    assert (folder / FILE).stat().st_mode & 0o777 == 0o600
    for path in folder.rglob("*"):
        if path.is_file() and path.name != FILE:
            content = path.read_bytes()
            assert SECRET.encode() not in content and b"pass-w0rd" not in content, path


def test_a_study_that_cannot_be_asked_is_not_discarded(tmp_path: Path) -> None:
    study = Study(tmp_path, _record("mine", storage="sqlite:////nowhere/at/all.db"))
    assert not study.never_began()
    empty = create_study(Home(root=tmp_path), _record("empty", storage=None))
    assert empty.never_began()
    empty.optuna().ask()
    assert not empty.never_began()
