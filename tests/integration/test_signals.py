"""SIGTERM and Ctrl-C at every stage of a search: exit code, message, nothing left, resumable."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .small_study import Workplace, family, left_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

GRACE_SECONDS = 30
"""What a preempted machine gives."""


def _stop(
    process: subprocess.Popen[str], when: Callable[[], object], *signals: signal.Signals
) -> str:
    """Send the signals at the moment `when`, and see the process end in time, with all that it
    started; what it printed."""
    with process:
        assert wait_for(when, process), process.communicate()[0]
        children = family(process.pid)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=120)
    assert time.monotonic() - sent < GRACE_SECONDS
    assert process.returncode == 128 + signals[0], output
    assert "Traceback" not in output
    assert left_of(children) == {}
    return output


def _check_closed(place: Workplace, study: str) -> None:
    parent, children = place.runs(study)
    assert "RUNNING" not in {run.info.status for run in [parent, *children]}


def test_a_search_that_is_stopped_at_every_stage_ends_whole(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    ended = place.folder("one") / "outcomes.jsonl"
    go_on = "tuner resume one"

    def ray_starts() -> bool:
        return any(b"gcs_server" in text for text in family(process.pid).values())

    process = place.start(*place.search("one"))
    assert go_on in _stop(process, ray_starts, signal.SIGTERM)
    _check_closed(place, "one")

    process = place.start("resume", "one")
    assert go_on in _stop(process, lambda: place.num_ended("one") >= 4, signal.SIGTERM)
    _check_closed(place, "one")
    before = ended.read_text()
    assert before.count("\n") >= 4

    process = place.start("resume", "one")
    records = place.folder("one") / "finalists"
    assert go_on in _stop(process, lambda: list(records.glob("*.json")), signal.SIGINT)
    _check_closed(place, "one")

    process = place.start("resume", "one")
    # Written just before the model is logged and registered.
    winner = place.folder("one") / "winner.json"
    assert go_on in _stop(process, winner.exists, signal.SIGTERM)
    _check_closed(place, "one")

    place.run("resume", "one")
    place.check_whole("one")
    assert ended.read_text().startswith(before)
    assert len(place.versions()) == 1


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    process = place.start(*place.search("one"))
    output = _stop(process, lambda: place.num_ended("one") >= 4, signal.SIGTERM, signal.SIGINT)
    assert "ended at once (a second signal)" in output
    assert "Go on with: tuner resume one" in output
    place.run("resume", "one")
    place.check_whole("one")


def test_a_signal_to_ray_as_well_is_no_crash(tmp_path: Path) -> None:
    """A machine that goes down tells every process, Ray's as well."""
    place = Workplace(tmp_path)
    process = place.start(*place.search("one"))
    with process:
        assert wait_for(lambda: place.num_ended("one") >= 4, process)
        children = family(process.pid)
        for pid in [process.pid, *children]:
            os.kill(pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "tuner resume one" in output and "Traceback" not in output
    assert left_of(children) == {}
    place.run("resume", "one")
    place.check_whole("one")
