"""SIGTERM and Ctrl-C at every stage of a search: exit code, message, nothing left, resumable."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ..processes import family, left_of, output_of, wait_for
from .small_study import NUM_TRIALS, PROBES
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

GRACE_SECONDS = 30
"""What a preempted machine gives."""


def _stop(
    place: Workplace,
    arguments: list[str],
    when: Callable[[subprocess.Popen[str]], object],
    *signals: signal.Signals,
) -> str:
    """Send the signals at the moment `when`, and see the process end in time, with all that it
    started; what it printed."""
    with place.start(*arguments) as process:
        wait_for(partial(when, process), process)
        children = family(process.pid)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        sent = time.monotonic()
        output = output_of(process, code=128 + signals[0])
    assert time.monotonic() - sent < GRACE_SECONDS
    assert "Traceback" not in output
    assert children and left_of(children) == {}
    return output


def _check_closed(place: Workplace, study: str) -> None:
    parent, children = place.runs(study)
    assert "RUNNING" not in {run.info.status for run in [parent, *children]}


def _ray_starts(process: subprocess.Popen[str]) -> bool:
    return any(b"gcs_server" in text for text in family(process.pid).values())


def test_a_search_that_is_stopped_at_every_stage_ends_whole(tmp_path: Path) -> None:
    place = Workplace(tmp_path, PROBES)
    ended = place.folder("one") / "outcomes.jsonl"
    go_on = "tuner resume one"

    assert go_on in _stop(place, place.search("one"), _ray_starts, signal.SIGTERM)
    _check_closed(place, "one")

    resume = ["resume", "one"]
    assert go_on in _stop(place, resume, lambda _: place.num_ended("one") >= 4, signal.SIGTERM)
    _check_closed(place, "one")
    before = ended.read_text()
    assert before.count("\n") >= 4

    records = place.folder("one") / "finalists"
    assert go_on in _stop(place, resume, lambda _: list(records.glob("*.json")), signal.SIGINT)
    _check_closed(place, "one")

    # Written just before the model is logged and registered.
    winner = place.folder("one") / "winner.json"
    assert go_on in _stop(place, resume, lambda _: winner.exists(), signal.SIGTERM)
    _check_closed(place, "one")

    place.run("resume", "one")
    place.check_whole("one", NUM_TRIALS)
    assert ended.read_text().startswith(before)
    assert len(place.versions()) == 1


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    place = Workplace(tmp_path, PROBES)
    twice = signal.SIGTERM, signal.SIGINT
    output = _stop(place, place.search("one"), lambda _: place.num_ended("one") >= 4, *twice)
    assert "ended at once (a second signal)" in output
    assert "Go on with: tuner resume one" in output
    place.run("resume", "one")
    place.check_whole("one", NUM_TRIALS)


def test_a_signal_to_ray_as_well_is_no_crash(tmp_path: Path) -> None:
    """A machine that goes down tells every process, Ray's as well."""
    place = Workplace(tmp_path, PROBES)
    with place.start(*place.search("one")) as process:
        wait_for(lambda: place.num_ended("one") >= 4, process)
        children = family(process.pid)
        for pid in [process.pid, *children]:
            os.kill(pid, signal.SIGTERM)
        output = output_of(process, code=128 + signal.SIGTERM)
    assert "tuner resume one" in output and "Traceback" not in output
    assert left_of(children) == {}
    place.run("resume", "one")
    place.check_whole("one", NUM_TRIALS)
