"""The dry run on the command line: the quote, and budgets and earlier studies that cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_a_dry_run_quotes(tuner: Run, home: Path, data: Path, space: Path) -> None:
    ended = tuner("search", space, "--data", data, "--dry-run", "--address", "local")
    assert ended.code == 0, ended.err
    for line in (
        r"features +ffn \(avg\): 24 pictures, \d+ s \(",
        r"features take +\d+ s \(",
        r"2 trials take +\d+ s \(",
        r"finalists take +\d+ s \(",
        r"in all +.*\d+ s \(",
        r"device-hours +[\d.]+ \([\d.]+ to [\d.]+\)",
    ):
        assert re.search(line, ended.out), (line, ended.out)
    assert "not of the cluster" not in ended.out
    limited = tuner("search", space, "--data", data, "--dry-run", "--device-hours", "0.00001")
    assert "about 0 of 2 trials take" in limited.out
    assert not [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device-hours", "0"], ("--device-hours: the time must be positive, but got 0.0",)),
        (["--device-hours", "nan"], ("--device-hours: the time must be positive",)),
        (["--from-study", "gone"], ("--from-study gone: no study can be read there", "studies")),
    ],
)
def test_what_cannot_be_is_refused(
    refused: Run, data: Path, space: Path, flags: list[str], says: tuple[str, ...]
) -> None:
    refused("search", space, "--data", data, *flags, says=says)
    refused("search", space, "--data", data, *flags, "--dry-run", says=says)


def test_damaged_speeds_are_named(tuner: Run, home: Path, data: Path, space: Path) -> None:
    home.mkdir()
    (home / "calibration.json").write_text("{")
    ended = tuner("search", space, "--data", data, "--dry-run")
    assert ended.code == 2 and "calibration.json: is damaged" in ended.err
