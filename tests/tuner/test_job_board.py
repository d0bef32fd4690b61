"""The board between worker groups and the trials that stand for them, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from core.report import Outcome, Status
from tuner.trials import job_board
from tuner.trials.job_board import RETRIES, JobBoard, Progress

DONE = Outcome(status=Status.COMPLETE, best_value=0.5)
JOB = {"cohort": "a"}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_board, "WAIT_SECONDS", 0.05)


def _run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


def test_a_trial_goes_from_the_queue_to_a_group_and_its_outcome_comes_back() -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=2)
        assert await board.reserve("g") is None  # nothing there: ask again
        await board.submit(JOB)
        assert await board.reserve("g") is True
        assert await board.take("g") == "a"
        assert await board.take("g") == "a"  # after a restart, the same one
        assert await board.job("a") == JOB
        assert not await board.post("a", 1, {"x": 0.1})
        assert await board.events("a", 0) == [Progress(epoch=1, metrics={"x": 0.1})]
        assert await board.stops("a", 1) is None
        await board.answer("a", 1, True)
        assert await board.stops("a", 1) is True
        assert await board.in_work()
        assert not await board.end("a", 0, DONE)
        assert await board.end("a", 1, Outcome(status=Status.COMPLETE))
        assert await board.events("a", 1) == [DONE]
        assert not await board.in_work()
        assert await board.take("g") == ""

    _run(scene())


def test_those_who_wait_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_board, "WAIT_SECONDS", 60.0)

    async def scene() -> None:
        board = JobBoard(num_ranks=1)
        taken = asyncio.ensure_future(board.take("g"))
        await asyncio.sleep(0)
        await board.submit(JOB)
        assert await taken == "a"
        events, stops = (
            asyncio.ensure_future(c) for c in (board.events("a", 0), board.stops("a", 1))
        )
        await board.post("a", 1, {})
        assert len(await events) == 1
        await board.answer("a", 1, False)
        assert await stops is False
        waiting = asyncio.ensure_future(board.reserve("h"))
        await asyncio.sleep(0)
        await board.close()
        assert await waiting is False

    _run(scene())


def test_a_trial_is_posted_once_and_held_by_one_group() -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=1)
        await board.submit(JOB)
        await board.submit(JOB)
        assert await board.take("g") == "a"
        assert await board.take("h") == ""
        await board.end("a", 0, DONE)
        await board.submit(JOB)  # a Tune trial that was run again hears the same events
        assert await board.take("g") == ""
        assert await board.events("a", 0) == [DONE]

    _run(scene())


def test_an_answer_to_an_earlier_run_of_an_epoch_is_void() -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=1)
        await board.submit(JOB)
        await board.take("g")
        await board.post("a", 1, {})
        await board.answer("a", 1, True)
        await board.failed("g", "killed")
        assert await board.take("g") == "a"
        await board.post("a", 1, {})
        assert await board.stops("a", 1) is None

    _run(scene())


def test_a_trial_fails_after_its_retries_with_the_last_reason() -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=1)
        await board.failed("g", "died before it had a trial")
        await board.submit(JOB)
        for attempt in range(RETRIES + 1):
            assert await board.take("g") == "a"
            await board.failed("g", f"death {attempt}")
        (outcome,) = await board.events("a", 0)
        assert isinstance(outcome, Outcome) and outcome.status is Status.FAILED
        assert f"failed {RETRIES + 1} times, at last: death {RETRIES}" in outcome.reason
        assert await board.reserve("g") is None  # and the group is free for the next

    _run(scene())


@pytest.mark.parametrize("status", [Status.FAILED, Status.INFEASIBLE])
def test_what_one_rank_alone_came_to_counts_if_its_group_dies_of_it(status: Status) -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=2)
        await board.submit(JOB)
        await board.take("g")
        alone = Outcome(status=status, reason="no room")
        assert not await board.end("a", 1, alone)
        assert await board.events("a", 0) == []
        await board.failed("g", "rank 1 could not go on")
        assert await board.events("a", 0) == [alone]

    _run(scene())


def test_a_completed_rank_is_no_outcome_if_rank_0_died() -> None:
    """Rank 0 has not saved the weights yet: the trial is taken up again."""

    async def scene() -> None:
        board = JobBoard(num_ranks=2)
        await board.submit(JOB)
        await board.take("g")
        await board.end("a", 1, DONE)
        await board.failed("g", "killed")
        assert await board.events("a", 0) == []
        assert await board.take("g") == "a"
        assert not await board.end("a", 0, DONE)  # rank 1 of before does not count
        assert await board.events("a", 0) == [DONE]

    _run(scene())


def test_at_the_end_of_the_study_all_stop() -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=1)
        await board.submit(JOB)
        await board.submit({"cohort": "b"})
        await board.take("g")
        await board.close()
        assert await board.post("a", 1, {}) is True
        assert await board.stops("a", 1) is True
        assert await board.take("h") is None
        assert await board.reserve("h") is False

    _run(scene())


def test_a_trial_that_nobody_follows_stops_or_does_not_begin() -> None:
    async def scene() -> None:
        board = JobBoard(num_ranks=1)
        await board.submit(JOB)
        await board.submit({"cohort": "b"})
        await board.take("g")
        await board.abandon("a")
        await board.abandon("b")
        await board.abandon("unknown")
        assert await board.post("a", 1, {}) is True
        assert await board.stops("a", 1) is True
        assert await board.take("h") == ""

    _run(scene())
