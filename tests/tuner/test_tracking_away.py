"""A study whose MLflow server is away: it goes on, says so, and writes all of it later."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

import tuner.tracking.tracker
from core.errors import InputError
from tuner.spaces.space import load_space
from tuner.studies.outcomes import EndedTrial
from tuner.views.live import StudyView

from ..lossy_proxy import LossyProxy, lossy_proxy
from ..processes import wait_for
from .tracked import assert_written, outcome, runs_of, tracker_of, write_trials

pytestmark = pytest.mark.usefixtures("quick_delivery")


def test_a_study_goes_on_while_mlflow_is_away(
    tracking_server: str, tracking_proxy: LossyProxy, name: str
) -> None:
    lines: list[str] = []
    delivery = tuner.tracking.tracker.mlflow_delivery(lines.append)
    tracker = tracker_of(tracking_proxy.address, name, delivery=delivery)
    tracker.start_study({})
    write_trials(tracker, range(1))
    tracker.flush()
    assert tracker.away == "" and lines == []
    tracking_proxy.away = True
    write_trials(tracker, range(1, 4))
    wait_for(lambda: tracker.away, seconds=60)
    assert tracker.away.startswith("MLflow away since ") and tracker.away.endswith("6 waiting")
    tracking_proxy.away = False
    tracker.end_study()
    tracker.flush()
    tracker.close()
    assert_written(tracking_server, name, range(4))
    assert len(lines) == 2 and "the study goes on" in lines[0] and lines[1] == "MLflow is back"


def test_the_live_view_says_that_mlflow_is_away(tracking_proxy: LossyProxy, name: str) -> None:
    stream = io.StringIO()
    view = StudyView(Console(file=stream, width=300), load_space("demo"), budget=3, floor=0.4)
    tracker = tracker_of(tracking_proxy.address, name)
    view.tracking_away = lambda: tracker.away
    tracking_proxy.away = True
    for number, is_away in enumerate((False, True)):
        with view.showing():
            view.trial_ended(number, {}, outcome(number))
        assert ("MLflow away since" in stream.getvalue()) is is_away
        tracker.start_study({})
        tracker.check_started()
    tracker._delivery.give_up()


def test_what_could_not_be_written_is_written_by_a_resumed_study(
    tracking_server: str,
    tracking_proxy: LossyProxy,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tuner.tracking.tracker, "END_SECONDS", 1)
    monkeypatch.setattr(tuner.tracking.tracker, "INTERRUPTED_SECONDS", 1)
    (tmp_path / "split.json").write_text("[]")
    first = tracker_of(tracking_proxy.address, name)
    first.start_study({"seed": 1})
    write_trials(first, range(2))
    first.trial_started(2, {"lr": 2})
    first.flush()
    tracking_proxy.away = True
    first.trial_ended(2, {"lr": 2}, outcome(2))
    write_trials(first, range(3, 5))
    first.end_study()
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        first.flush()
    message = str(caught.value)
    assert "could not be written for 1 s" in message and "7 writes wait" in message
    assert f"--tracking-uri {tracking_proxy.address}" in message
    assert f"tuner resume {name}" in message
    first.close()
    assert time.monotonic() - started < 30
    (parent,), children = runs_of(tracking_server, name)
    assert parent.info.status == "RUNNING" and sorted(children) == [0, 1, 2]
    tracking_proxy.away = False
    second = tracker_of(tracking_proxy.address, name)
    second.start_study({"seed": 1, "sampler": "tpe"}, [tmp_path / "split.json"])
    second.check_started()
    assert second.parent_run_id == parent.info.run_id
    ends = {n: EndedTrial(number=n, settings={"lr": n}, outcome=outcome(n)) for n in range(5)}
    second.repair(ends, list(ends))
    second.end_study()
    second.flush()
    second.close()
    parent = assert_written(tracking_server, name, range(5))
    assert parent.info.status == "FINISHED"
    # What a kill between making the parent and filling it had left out.
    assert parent.data.params == {"seed": "1", "sampler": "tpe"}
    files = MlflowClient(tracking_server).list_artifacts(parent.info.run_id)
    assert [file.path for file in files] == ["split.json"]


def test_weights_do_not_wait_with_their_trial(tracking_server: str, name: str) -> None:
    import gc
    import weakref

    import torch

    weights = torch.zeros(3)
    watched = weakref.ref(weights)
    with lossy_proxy(tracking_server) as proxy:
        proxy.away = True
        tracker = tracker_of(proxy.address, name)
        tracker.start_study({})
        tracker.trial_ended(0, {}, replace(outcome(0), state={"head": weights}))
        del weights
        gc.collect()
        assert watched() is None
        tracker._delivery.give_up()


def test_passwords_stay_out_of_messages(name: str) -> None:
    tracker = tracker_of("http://me:secret@127.0.0.1:1", name)
    tracker.start_study({})
    with pytest.raises(InputError) as caught:
        tracker.flush(limit=0.5)
    tracker.close()
    assert "secret" not in str(caught.value) and "Connection refused" in str(caught.value)
