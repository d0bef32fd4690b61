"""Waiting for a database that is away: what is said, how often it is tried, when it ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from core.config import TrialConfig
from core.errors import InputError
from core.report import Outcome, Status
from tuner.signals import Interrupted, stoppable
from tuner.spaces.space import load_space
from tuner.studies.outage import LONGEST_PAUSE, Outage
from tuner.studies.outcomes import OutcomeLog
from tuner.trials.context import request_of
from tuner.trials.on_tune import own_errors
from tuner.trials.searcher import Budget, CohortSearcher
from tuner.views.live import StudyView


class Time:
    """A clock that runs only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def _outage(time: Time, *, limit: float = 60) -> Outage:
    return Outage(
        where="--storage x", hint="do this", limit=limit, clock=time.clock, sleep=time.sleep
    )


def test_pauses_grow_and_end_at_the_limit() -> None:
    time = Time()
    outage = _outage(time)
    pauses = []
    with pytest.raises(
        InputError, match=r"--storage x: .* away, for 1 min 0 s now \(gone\)\n.*this"
    ):
        for attempt in range(1000):
            before = time.now
            outage.wait(attempt, "gone", began=time.now)
            pauses.append(time.now - before)
    assert time.now == pytest.approx(160)
    assert pauses[0] <= 0.2 and max(pauses) <= LONGEST_PAUSE
    assert 0.7 * LONGEST_PAUSE <= pauses[-3] <= LONGEST_PAUSE
    assert len(pauses) < 25


def test_a_line_for_each_outage_and_patience_for_the_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    time = Time()
    outage = _outage(time, limit=3)
    outage.answered(began=time.now)
    for _ in range(2):
        for attempt in range(3):
            outage.wait(attempt, "gone", began=time.now)
        outage.answered(began=time.now)
    lines = capsys.readouterr().err.splitlines()
    assert [("away (gone)" in line, "back after" in line) for line in lines] == 2 * [
        (True, False),
        (False, True),
    ]


def test_threads_of_one_outage_begin_and_end_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Tries overlap: an answer from before it is no end, a failure from before its end no begin."""
    time = Time()
    outage = _outage(time)
    early = time.now
    time.sleep(1)
    outage.wait(0, "gone", began=early)
    outage.answered(began=early)
    assert "back" not in capsys.readouterr().err
    late = time.now
    time.sleep(1)
    outage.answered(began=time.now)
    assert "back" in capsys.readouterr().err
    before = time.now
    outage.wait(0, "gone", began=late)
    assert time.now == before and not capsys.readouterr().err
    time.sleep(1)
    outage.wait(0, "gone", began=time.now)
    assert "away" in capsys.readouterr().err


def test_an_interruption_ends_every_wait() -> None:
    """Also those of other threads, and those that would begin while the study is closed."""
    started = threading.Event()
    ended: list[BaseException] = []
    outage = Outage(where="w", hint="h", limit=60)

    def other() -> None:
        try:
            for attempt in range(100):
                outage.wait(attempt + 5, "gone", began=outage.now())
                started.set()
        except InputError as error:
            ended.append(error)

    with stoppable():
        thread = threading.Thread(target=other)
        thread.start()
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGTERM])
        # `raise_signal` in another thread: the answer runs in this one, during its sleep.
        timer.start()
        with pytest.raises(Interrupted):
            for attempt in range(100):
                outage.wait(attempt + 5, "gone", began=outage.now())
        with pytest.raises(InputError):
            outage.wait(0, "gone", began=outage.now())
        thread.join(60)
    assert not thread.is_alive() and len(ended) == 1


def test_the_live_table_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200)
    view = StudyView(console, load_space("demo"), budget=2, floor=0.1)
    view.storage_away(0.0, "connection refused")
    view.storage_away(3.0, "connection refused")
    assert "storage away for" in view._status().plain
    view.storage_back(4.0)
    assert "storage away" not in view._status().plain
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "away (connection refused)" in lines[0] and "back after 4 s" in lines[1]


def test_an_input_error_comes_out_of_tune_as_itself() -> None:
    def tune(error: Exception) -> None:
        try:
            raise error
        except Exception:
            raise RuntimeError("a text of Tune's")  # noqa: B904  # As Tune does.

    with pytest.raises(InputError, match="away"), own_errors():
        tune(InputError("away"))
    with pytest.raises(RuntimeError, match="of Tune's"), own_errors():
        tune(KeyError("x"))


class _Delivered:
    """A channel in which every cohort's outcomes lie."""

    def collect(self, cohort: str) -> list[object]:
        return [[Outcome(status=Status.FAILED, reason="no features"), _complete()]]


def _complete() -> Outcome:
    metrics = ({"validation_top3_accuracy": 0.5},)
    return Outcome(status=Status.COMPLETE, best_value=0.5, best_epoch=1, curve=metrics)


def test_an_error_at_a_cohorts_end_is_not_taken_for_its_workers(tmp_path: Path) -> None:
    """Tune swallows what a searcher raises there, and would train the cohort again. All of its
    trials are on the disk before the first is told, and can be told later."""
    space = load_space("demo")
    study = optuna.create_study(direction="maximize")
    request = request_of(TrialConfig(backbone="ffn"))
    log = OutcomeLog(tmp_path)
    searcher = CohortSearcher(
        study, space, budget=Budget(trials=2), features={request: "nowhere"},
        channel=_Delivered(), log=log, watchers=[], seed=0, rungs=[],  # type: ignore[arg-type]
    )  # fmt: skip
    study.enqueue_trial({"backbone": "ffn"})
    study.enqueue_trial({"backbone": "ffn"})
    job = searcher.suggest("tune")
    assert isinstance(job, dict) and job["numbers"] == [0, 1]

    def away(*_: object, **__: object) -> None:
        raise InputError("the storage is away")

    study.tell = away  # type: ignore[method-assign]
    searcher.on_trial_complete("tune", {})
    assert sorted(log.read()) == [0, 1]
    for ask in (lambda: searcher.suggest("next"), lambda: searcher.on_trial_result("tune", {})):
        with pytest.raises(InputError, match="is away"):
            ask()
