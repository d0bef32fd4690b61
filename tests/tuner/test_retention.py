"""Weights of fine-tuned trials on disk: the best few of the study, whatever the order."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.report import Outcome, Status
from tuner.studies.outcomes import EndedTrial
from tuner.trials.retention import KEPT, StateKeeper


def _context(folder: Path) -> Any:
    return SimpleNamespace(
        state_path=lambda number: folder / str(number),
        checkpoint_folder=lambda number: (
            folder.with_name(f"{folder.name}-checkpoints") / f"{number}"
        ),
    )


def _outcome(value: float | None) -> Outcome:
    return Outcome(status=Status.COMPLETE, best_value=value)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))))
def test_the_best_are_kept_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    keeper = StateKeeper(_context(tmp_path))
    for number in order:
        (tmp_path / str(number)).touch()
        keeper.trial_ended(number, {}, _outcome(number / 10))
        assert len(list(tmp_path.iterdir())) <= KEPT
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "4"}


def test_of_equals_the_earlier_is_kept(tmp_path: Path) -> None:
    keeper = StateKeeper(_context(tmp_path))
    for number in (3, 1, 0, 2):
        (tmp_path / str(number)).touch()
        keeper.trial_ended(number, {}, _outcome(0.5))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}


def test_trials_without_a_state_or_a_value_take_no_place(tmp_path: Path) -> None:
    keeper = StateKeeper(_context(tmp_path))
    (tmp_path / "0").touch()
    keeper.trial_ended(0, {}, _outcome(None))
    for number in range(1, 6):  # pruned ones: a good value, and no state
        keeper.trial_ended(number, {}, _outcome(0.9))
    (tmp_path / "6").touch()
    keeper.trial_ended(6, {}, _outcome(0.1))
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_earlier_sessions_count(tmp_path: Path) -> None:
    earlier = []
    for number in range(3):
        (tmp_path / str(number)).touch()
        earlier.append(EndedTrial(number=number, settings={}, outcome=_outcome(0.5 + number / 10)))
    keeper = StateKeeper(_context(tmp_path), earlier)
    (tmp_path / "3").touch()
    keeper.trial_ended(3, {}, _outcome(0.55))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}


@pytest.mark.parametrize("status", list(Status))
def test_checkpoints_go_when_their_trial_has_ended(tmp_path: Path, status: Status) -> None:
    context = _context(tmp_path)
    for number in (1, 2):
        context.checkpoint_folder(number).mkdir(parents=True)
        (context.checkpoint_folder(number) / "last.pt").touch()
    StateKeeper(context).trial_ended(1, {}, Outcome(status=status))
    assert not context.checkpoint_folder(1).exists()
    assert context.checkpoint_folder(2).exists()
    # Left over by a kill between the trial's end and the deletion:
    StateKeeper(context, [EndedTrial(number=2, settings={}, outcome=Outcome(status=status))])
    assert not context.checkpoint_folder(2).exists()


def test_one_that_violates_a_constraint_is_not_kept(tmp_path: Path) -> None:
    """Though it was trained to its end, and well."""
    keeper = StateKeeper(_context(tmp_path))
    for number in range(2):
        (tmp_path / str(number)).touch()
    keeper.trial_ended(0, {}, _outcome(0.5))
    keeper.trial_ended(1, {}, Outcome(status=Status.INFEASIBLE, best_value=0.9))
    assert {path.name for path in tmp_path.iterdir()} == {"0"}
