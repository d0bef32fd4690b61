"""The driver's side of worker groups: groups that die are counted, their words kept."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from core.config import TrialConfig
from core.errors import InputError
from core.report import Outcome, Status
from tuner.trials import worker_group
from tuner.trials.worker_group import REASON_LENGTH, _keep_up, _reason, train_job

JOB = {
    "cohort": "cohort-1",
    "numbers": [7],
    "trials": [TrialConfig(mode="finetune", backbone="squeezenet1_1", batch_size=4).to_dict()],
    "features": [{"plain": "/nowhere"}],
}


class DiedError(Exception):
    """As Ray Train's WorkerGroupError."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors: ...")
        self.worker_failures = failures


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("wrong"), "wrong"),
        (ValueError(), "ValueError"),
        (DiedError({}), "Training failed due to worker errors: ..."),
        (
            DiedError({1: OSError("Traceback:\n  File x\nOSError: gone\n")}),
            "worker 1: OSError: gone",
        ),
        (DiedError({1: OSError("b"), 0: OSError("a")}), "worker 0: a"),
    ],
)
def test_a_reason_is_the_last_words_of_the_first_worker(error: Exception, expected: str) -> None:
    assert _reason(error) == expected


def test_a_reason_is_short() -> None:
    assert len(_reason(ValueError("x" * 10_000))) == REASON_LENGTH


class Board:
    """A board that has so many trials, then says that there is no more to do."""

    def __init__(self, num_trials: int) -> None:
        self.left = num_trials
        self.failures: list[str] = []
        self.reported: list[tuple[int, bool]] = []

    def reserve(self, group: str) -> bool:
        self.left -= 1
        return self.left >= 0

    def failed(self, group: str, reason: str) -> None:
        self.failures.append(reason)

    def report(self, cohort: str, epoch: int, metrics: Any, *, wait: bool) -> bool:
        self.reported.append((epoch, wait))
        return wait


def _keep(
    board: Board,
    monkeypatch: pytest.MonkeyPatch,
    *deaths: Exception | None,
    at_once: bool = False,
) -> int:
    """Keep a group up whose runs end so; how often it was run."""
    ends = list(deaths)
    runs = 0

    def run_group(*_: Any) -> None:
        nonlocal runs
        runs += 1
        end = ends.pop(0)
        if end is not None:
            raise end

    monkeypatch.setattr(worker_group, "_run_group", run_group)
    arguments: Any = (None, None, board, at_once)
    _keep_up("group-0", *arguments)
    return runs


def test_a_group_that_dies_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(3)
    assert _keep(board, monkeypatch, DiedError({0: OSError("a")}), ValueError("b"), None) == 3
    assert board.failures == ["worker 0: a", "b"]


def test_nothing_is_started_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _keep(Board(0), monkeypatch) == 0


def test_the_first_group_does_not_wait_for_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _keep(Board(0), monkeypatch, None, at_once=True) == 1
    board = Board(1)  # One that dies before it has a trial starts again when there is one.
    assert _keep(board, monkeypatch, ValueError("x"), None, at_once=True) == 2


@pytest.mark.parametrize("connected", [True, False])
def test_an_error_after_the_connection_is_gone_is_the_interruption(
    monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    board = Board(1)
    monkeypatch.setattr(board, "failed", lambda *_: (_ for _ in ()).throw(RuntimeError("no Ray")))
    monkeypatch.setattr(ray, "is_initialized", lambda: connected)
    if connected:
        with pytest.raises(RuntimeError, match="no Ray"):
            _keep(board, monkeypatch, ValueError("x"))
    else:
        assert _keep(board, monkeypatch, ValueError("x")) == 1


class Context:
    rungs = (2,)


def _train(monkeypatch: pytest.MonkeyPatch, end: Exception | None, board: Board) -> Outcome:
    def finetune_trial(*_: Any, report: Any, **__: Any) -> Outcome:
        if end is not None:
            raise end
        stops = [report(epoch, {}) for epoch in (1, 2)]
        return Outcome(status=Status.PRUNED, reason=f"{stops}")

    monkeypatch.setattr(worker_group, "finetune_trial", finetune_trial)
    monkeypatch.setattr(worker_group, "open_matrix", lambda folder: None)
    arguments: Any = (Context, board, None, None)
    return train_job(JOB, *arguments)


def test_the_study_is_waited_for_at_rungs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    assert _train(monkeypatch, None, board).reason == "[False, True]"
    assert board.reported == [(1, False), (2, True)]


@pytest.mark.parametrize(
    "error, status, words",
    [
        (InputError("disk full"), Status.FAILED, "disk full"),
        (MemoryError("bad alloc"), Status.INFEASIBLE, "out of memory with batches of 4: bad alloc"),
        (RuntimeError("CUDA out of memory. Tried"), Status.INFEASIBLE, "batches of 4"),
    ],
)
def test_what_a_trial_cannot_help_is_its_outcome(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: Status, words: str
) -> None:
    outcome = _train(monkeypatch, error, Board(0))
    assert outcome.status is status and words in outcome.reason


def test_other_errors_are_for_ray_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        _train(monkeypatch, RuntimeError("shapes do not fit"), Board(0))
