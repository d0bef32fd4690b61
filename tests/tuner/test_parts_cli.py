"""Two-part spaces and studies on the command line: what is shown, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .two_parts import TWO_PARTS

Run = Callable[..., Any]


@pytest.fixture
def both(tmp_path: Path) -> Path:
    path = tmp_path / "both.yaml"
    path.write_text(TWO_PARTS)
    return path


def search(tuner: Run, both: Path, data: Path, *flags: Any) -> Any:
    return tuner("search", both, "--data", data, "--weights", "none", "--dry-run", *flags)


def test_dry_run_shows_both_parts(tuner: Run, home: Path, data: Path, both: Path) -> None:
    ended = search(tuner, both, data, "--trials", 7, "--finetune-trials", 3)
    assert ended.code == 0, ended.err
    first, second = ended.out.split("fine-tuning part")
    assert re.search(r"study +both-1 *\n", first) and "probe part" in first
    assert re.search(r"trials +7 of endlessly many configurations *\n", first)
    assert "squeezenet1_1 at 32 px (avg)" in first and "pixels" not in first
    assert "first trials from the best 2 probes" in second
    assert re.search(r"trials +3 of 4 configurations *\n", second)
    assert re.search(r"sampler +random, pruner successive_halving", second)
    assert "48 px (pixels)" in second
    assert not [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--finetune-trials", "0"], "--finetune-trials: at least one trial is needed, but got 0"),
        (["--trials", "0"], "--trials: at least one trial is needed, but got 0"),
        (["--hours", "0"], "--hours: the time must be positive, but got 0.0"),
        (["--folds", "3"], "--folds: folds are for probes"),
        (["--study", "x" * 95], "cannot name a study"),
    ],
)
def test_flags_that_do_not_fit(
    tuner: Run, home: Path, data: Path, both: Path, flags: list[str], problem: str
) -> None:
    ended = search(tuner, both, data, *flags)
    assert ended.code == 2 and problem in ended.err
    assert not list(home.glob("studies/*"))


def test_finetune_trials_of_a_space_of_one_part(tuner: Run, data: Path, space: Path) -> None:
    ended = search(tuner, space, data, "--finetune-trials", 3)
    assert ended.code == 2
    assert "--finetune-trials: the space tiny has no fine-tuning part" in ended.err


@pytest.mark.parametrize(
    ("drop_path", "refused"),
    [
        ("0.1", True),
        ("{low: 0.0, high: 0.2}", True),
        ("{when: {backbone: squeezenet1_1}, choice: [0.0, 0.2]}", True),
        ("{when: {backbone: efficientnet_b0}, low: 0.0, high: 0.2}", False),
        ("0.0", False),
    ],
)
def test_drop_path_is_for_backbones_that_have_it(
    tuner: Run, data: Path, both: Path, drop_path: str, refused: bool
) -> None:
    before, after = TWO_PARTS.rsplit("backbone: squeezenet1_1", 1)
    text = f"{before}backbone: [squeezenet1_1, efficientnet_b0]{after}"
    both.write_text(text.replace("unfrozen_stages: [1, 2]", f"drop_path: {drop_path}"))
    ended = search(tuner, both, data)
    assert ended.code == (2 if refused else 0), ended.err
    assert ("squeezenet1_1 has no blocks that can be skipped" in ended.err) == refused


def test_both_names_must_be_free(tuner: Run, home: Path, data: Path, both: Path) -> None:
    (home / "studies" / "mine-finetune").mkdir(parents=True)
    ended = search(tuner, both, data, "--study", "mine")
    assert ended.code == 2 and "a study named 'mine-finetune' exists" in ended.err
    (home / "studies" / "both-1-finetune").mkdir()
    ended = search(tuner, both, data)
    assert re.search(r"study +both-2 *\n", ended.out), "the first whose two names are free"


def test_space_check_and_list_show_both_parts(tuner: Run, both: Path) -> None:
    checked = tuner("space", "check", both)
    assert checked.out == (
        "both: 4 parameters, endlessly many configurations, 9 trials by tpe, "
        "pruned by successive_halving\n"
        "both, then fine-tuning from 2 probes: 4 parameters, 4 configurations, 5 trials by random, "
        "pruned by successive_halving\n"
    )
    (line,) = [line for line in tuner("space", "list").out.splitlines() if "two_stage " in line]
    assert "probe, finetune" in line and "120 + 24" in line


def test_trials_of_both_parts(tuner: Run, home: Path, data: Path, both: Path) -> None:
    from rich.console import Console

    from tuner.home import open_home
    from tuner.preparation import SearchRequest, prepare
    from tuner.spaces.space import load_space
    from tuner.studies.parts import begin_finetune_study
    from tuner.studies.seeds import Seed
    from tuner.studies.study import create_study

    request = SearchRequest(
        space=load_space(both), data={"data": data}, study="mine", weights="none", trials=1,
        finetune_trials=3,
    )  # fmt: skip
    place = open_home(home)
    record, _, split = prepare(request, place, Console(quiet=True))
    assert (record.trials, record.finetune_trials) == (1, 3)
    study = create_study(place, record)
    split.save(study.split_path)
    asked = study.optuna(new=True).ask()
    study.space().suggest(asked)
    assert [
        json.loads(line)["number"] for line in tuner("trials", "mine", "--json").out.splitlines()
    ]
    seed = Seed(
        number=0, value=0.5, point={"backbone": "squeezenet1_1", "image_size": 48}, used=(),
        left_out=(),
    )  # fmt: skip
    second = begin_finetune_study(place, study, [seed])
    second.space().suggest(second.optuna().ask())
    lines = [json.loads(line) for line in tuner("trials", "mine", "--json").out.splitlines()]
    assert [(t["study"], t["settings"]["mode"]) for t in lines] == [
        ("mine", "probe"),
        ("mine-finetune", "finetune"),
    ]
    shown = tuner("trials", "mine").out
    assert "mine: 1 trials: 1 running" in shown
    assert "mine-finetune: 1 trials: 1 running" in shown
    refused = tuner("resume", "mine-finetune")
    assert refused.code == 2 and "go on with both: tuner resume mine" in refused.err
