"""A full disk in a fine-tuning trial: it ends the session, also from one rank of a worker group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import TrialConfig
from core.errors import NoRoomError
from core.report import Outcome, Status
from tuner.trials import finetuning, job_board, worker_group
from tuner.trials.job_board import BoardHandle, JobBoard, Progress
from tuner.trials.searcher import CohortSearcher
from tuner.trials.worker_group import follow_trial, train_job, work

from ..disks import small_disk

FULL = NoRoomError("no room for a checkpoint", where="/somewhere", hint="free some room")
VALUES = TrialConfig(mode="finetune", backbone="squeezenet1_1", batch_size=4).to_dict()
JOB = {"cohort": "a", "numbers": [7], "trials": [VALUES], "features": [{"plain": "/nowhere"}]}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_board, "WAIT_SECONDS", 0.05)


class Handle(BoardHandle):
    """A board in this process, asked as one in an actor is."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__(None)
        self.board = JobBoard(num_ranks)
        self._loop = asyncio.new_event_loop()

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._loop.run_until_complete(getattr(self.board, method)(*arguments))

    def close_loop(self) -> None:
        self._loop.close()


@pytest.fixture
def board() -> Iterator[Handle]:
    board = Handle(num_ranks=2)
    board.submit(JOB)
    yield board
    board.close_loop()


def _without_room(*_: Any, report: Any, **__: Any) -> Outcome:
    report(1, {"x": 0.1})
    raise FULL


def test_no_trial_begins_after_a_disk_was_full(board: Handle) -> None:
    board.submit({**JOB, "cohort": "b"})
    assert board.take("g") == "a"
    board.report("a", 1, {}, wait=False)
    board.no_room("a", FULL)
    events = list(board.events("a"))
    assert events == [Progress(epoch=1, metrics={}), FULL]
    assert not board.in_work()
    assert board.take("h") is None and not board.reserve("h")
    board.failed("g", "its workers are gone")  # The group ends: the trial still has no outcome.
    assert list(board.events("a"))[-1] is FULL
    assert list(board.events("b")) == [FULL], "who follows it would wait for ever"
    board.submit({**JOB, "cohort": "c"})
    assert list(board.events("c")) == [FULL]


def test_a_trial_of_another_group_goes_on_to_its_end(board: Handle) -> None:
    done = Outcome(status=Status.COMPLETE)
    for name in ("b", "c"):
        board.submit({**JOB, "cohort": name})
    assert [board.take(group) for group in "ghi"] == ["a", "b", "c"]
    board.no_room("a", FULL)
    board.failed("i", "its worker died, too")
    board.end("b", 0, done, patience=0)
    assert list(board.events("b")) == [done]
    assert list(board.events("c")) == [FULL], "nobody would take it up again"


def test_finalists_hear_of_it(board: Handle, tmp_path: Path) -> None:
    from tuner.finalists.repeats import Candidate, Job, Repeat, follow_job

    config = TrialConfig.from_dict(VALUES)
    candidate = Candidate(study="s", number=3, config=config, value=0.5, features={})
    job = Job(place=0, step="x", repeats=(Repeat(candidate=candidate, config=config),))
    board.no_room("a", FULL)
    nobody: Any = SimpleNamespace(deliver=lambda *_: None)
    context: Any = SimpleNamespace(folder=tmp_path)
    assert follow_job(context, job, nobody, board) is FULL


def test_the_rank_that_has_no_room_says_so_and_its_group_ends(
    board: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import train
    from ray.train import collective
    from ray.train import torch as ray_torch

    import core.finetuning.ranks

    rank = SimpleNamespace(get_world_rank=lambda: 0)
    monkeypatch.setattr(train, "get_context", lambda: rank)
    monkeypatch.setattr(collective, "broadcast_from_rank_zero", lambda name: name)
    monkeypatch.setattr(ray_torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(core.finetuning.ranks, "joined_ranks", lambda: None)
    monkeypatch.setattr(worker_group, "prepare_worker", lambda _: None)
    monkeypatch.setattr(worker_group, "open_matrix", lambda _: None)
    monkeypatch.setattr(worker_group, "finetune_trial", _without_room)
    with pytest.raises(NoRoomError):
        work({"context": SimpleNamespace(rungs=()), "board": board, "group": "g"})
    assert list(board.events("a"))[-1] is FULL


def test_a_full_disk_is_no_outcome_of_the_trial(
    board: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "open_matrix", lambda _: None)
    monkeypatch.setattr(worker_group, "finetune_trial", _without_room)
    arguments: Any = (SimpleNamespace(rungs=()), board, None, None)
    with pytest.raises(NoRoomError):
        train_job(JOB, *arguments)


def test_the_driver_hears_of_it_and_raises(board: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stand-in on Tune delivers is what the searcher ends the session with."""
    from ray import tune

    board.no_room("a", FULL)
    delivered: list[Any] = []
    channel: Any = SimpleNamespace(
        deliver=lambda _, item: delivered.append(item), collect=lambda _: list(delivered)
    )
    monkeypatch.setattr(tune, "report", lambda _: None)
    context: Any = SimpleNamespace(rungs=(), objective="top3_accuracy")
    follow_trial(JOB, context, channel, board)
    assert delivered == [FULL]
    searcher = CohortSearcher.__new__(CohortSearcher)
    searcher._channel, searcher._failure = channel, None
    searcher._running = {"t": SimpleNamespace(name="a")}  # type: ignore[dict-item]
    searcher.on_trial_complete("t")
    with pytest.raises(NoRoomError, match="no room for a checkpoint"):
        searcher.check()
    assert searcher._running, "the trial stays RUNNING, for the next session"


def test_weights_for_which_there_is_no_room(tmp_path: Path) -> None:
    state = {"weight": torch.arange(250_000, dtype=torch.float32)}
    with small_disk(tmp_path / "disk", num_bytes=400_000) as disk:
        path = disk / "states" / "000007.safetensors"
        with pytest.raises(NoRoomError, match=r"take 1\.0 MB, and 0\.4 MB are free"):
            finetuning._keep_state(path, state)
        assert not list(path.parent.iterdir()), "a part of them was left"
        small = {"weight": state["weight"][:1000].clone()}
        finetuning._keep_state(path, small)
        assert torch.equal(load_file(path)["weight"], small["weight"])


def test_another_error_of_writing_weights_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(finetuning, "save_state", broken)
    with pytest.raises(OSError, match="Input/output") as caught:
        finetuning._keep_state(tmp_path / "states" / "1.safetensors", {"w": torch.zeros(2)})
    assert not isinstance(caught.value, NoRoomError)
