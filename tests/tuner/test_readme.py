"""The README holds: its commands exist, its space is valid, and the tour runs as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tuner.cli.main import cli
from tuner.spaces.space import load_space

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _commands() -> list[str]:
    """Every line of a shell block, without its comment."""
    lines = [line.split("  #")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def _tour() -> list[str]:
    (block,) = (block for block in _blocks("sh") if "--study tour" in block)
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {line.split()[1] for line in _commands() if line.startswith("make ")}
    named |= set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "test", "setup"} <= named
    assert named <= set(targets)


def test_every_command_is_one_that_the_command_line_takes() -> None:
    commands = [line for line in _commands() if line.startswith("tuner ")]
    commands += re.findall(r"`(tuner (?:[a-z]+ ?)+)`", README)
    assert len(commands) >= 12
    for line in commands:
        command: click.Command = cli
        arguments = shlex.split(line)[1:]
        while isinstance(command, click.Group) and arguments:
            name, *arguments = arguments
            found = command.get_command(click.Context(command), name)
            assert found is not None, line
            command = found
        if not line.startswith("`") and line in _commands():
            command.make_context("tuner", arguments)  # raises a usage error for what is unknown


def test_the_space_shown_is_valid(tmp_path: Path) -> None:
    block, goals = _blocks("yaml")
    path = tmp_path / "shown.yaml"
    path.write_text(block)
    space = load_space(path)
    assert space.trials == 100
    assert "timm/convnext_tiny" in block
    path.write_text(block + goals)
    assert load_space(path).constraints


def test_pictures_that_are_shown_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_tour_runs_as_written(tmp_path: Path) -> None:
    """Every command of the tour but the last, which serves until it is stopped (test_ui.py)."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "tuner").write_text(f'#!/bin/sh\nexec {sys.executable} -m tuner "$@"\n')
    (scripts / "tuner").chmod(0o755)
    environment = {
        **os.environ,
        "TUNER_HOME": str(tmp_path / "home"),
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    *commands, last = _tour()
    assert last == "tuner ui"
    assert commands[0].startswith("export PATH=")
    for command in commands[1:]:
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
