"""Death at any moment of the driver, and of workers: nothing is lost, nothing runs twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tuner.studies.outcomes import OutcomeLog

from ..processes import comes_about, family, left_of, output_of, wait_for, without_agents
from .small_study import FINETUNES, NUM_FINETUNES, NUM_TRIALS, PROBES
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a driver dies: so long after something has come about."""

    name: str
    begun: Callable[[Workplace, int], object]
    """Whether it has come about, in a process of this number."""
    seconds: float


def _process_lives(place: Workplace, pid: int) -> bool:
    return True


def _ray_starts(place: Workplace, pid: int) -> bool:
    return any(b"gcs_server" in text for text in family(pid).values())


def _features_begin(place: Workplace, pid: int) -> bool:
    return bool(list(place.home.cache.glob("*/*/spec.json")))


def _ended(count: int) -> Callable[[Workplace, int], bool]:
    return lambda place, pid: place.num_ended("killed") >= count


def _finalists_begin(place: Workplace, pid: int) -> bool:
    return place.num_ended("killed") == NUM_TRIALS


def _winner_is_known(place: Workplace, pid: int) -> bool:
    return (place.folder("killed") / "winner.json").exists()


def _moments(seed: int) -> list[Moment]:
    """Twenty, over the whole life of a study, in the order of what they wait for."""
    chance = random.Random(seed)
    stages: list[tuple[str, Callable[[Workplace, int], object], float, int]] = [
        ("start", _process_lives, 8.0, 2),
        ("Ray", _ray_starts, 6.0, 2),
        ("features", _features_begin, 1.0, 2),
        *((f"{n} trials", _ended(n), 0.7, 1) for n in range(1, NUM_TRIALS, 3)),
        ("finalists", _finalists_begin, 3.0, 3),
        ("registration", _winner_is_known, 3.0, 3),
    ]
    return [
        Moment(name=name, begun=begun, seconds=chance.uniform(0, longest))
        for name, begun, longest, count in stages
        for _ in range(count)
    ]


def test_a_driver_killed_at_twenty_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    place = Workplace(tmp_path, PROBES)
    place.run(*place.search("undisturbed", "--model", "undisturbed"))
    moments = _moments(seed=0)
    assert len(moments) == 20
    arguments, survived = place.search("killed"), []
    for moment in moments:
        with place.start(*arguments) as process:
            begun = partial(moment.begun, place, process.pid)
            alive = comes_about(begun, process)
            time.sleep(moment.seconds)
            children = without_agents(family(process.pid))
            process.kill()
            process.communicate()
        if not alive or process.returncode != -signal.SIGKILL:
            survived.append(moment.name)  # It was at its end.
        assert left_of(children) == {}, moment.name
        if (place.folder("killed") / "study.json").exists():
            arguments = ["resume", "killed"]
    assert set(survived) <= {"registration"}, survived
    place.run("resume", "killed")
    place.check_whole("killed", NUM_TRIALS)
    # One worker and one seed: the same proposals, the same values, the same best.
    assert place.values("killed") == place.values("undisturbed")
    assert len(place.versions()) == 1


def _kill(text: bytes, process: subprocess.Popen[str]) -> int:
    """SIGKILL to a process whose command line holds the text; its number."""
    pid = max(pid for pid, line in family(process.pid).items() if text in line)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_worker_of_a_probe_cohort_costs_nothing(tmp_path: Path) -> None:
    """The cohort trains again from its start: its own interval, as probes keep no checkpoints."""
    place = Workplace(tmp_path, PROBES)
    place.run(*place.search("undisturbed", "--model", "undisturbed"))
    with place.start(*place.search("killed")) as process:
        wait_for(lambda: place.num_ended("killed") >= 4, process)
        _kill(b"ImplicitFunc", process)
        assert place.num_ended("killed") < NUM_TRIALS, "all trials were over before"
        output_of(process)
    place.check_whole("killed", NUM_TRIALS)
    assert place.values("killed") == place.values("undisturbed")


def test_a_killed_worker_of_a_fine_tuning_repeats_an_epoch_at_most(tmp_path: Path) -> None:
    place = Workplace(tmp_path, FINETUNES)
    place.run(*place.search("undisturbed", "--model", "undisturbed"))
    last = place.folder("killed") / "checkpoints" / "000001" / "last.pt"
    written: list[float] = []

    def third_epoch() -> bool:
        """Three checkpoints of the second trial have been written."""
        if last.exists() and (changed := last.stat().st_mtime) not in written:
            written.append(changed)
        return len(written) >= 3

    with place.start(*place.search("killed")) as process:
        wait_for(third_epoch, process)
        _kill(b"ImplicitFunc", process)
        written.clear()
        wait_for(lambda: [third_epoch(), place.num_ended("killed") >= 2][1], process)
        output_of(process)
    place.check_whole("killed", NUM_FINETUNES)
    curves = {
        study: {n: e.outcome.curve for n, e in OutcomeLog(place.folder(study)).read().items()}
        for study in ("undisturbed", "killed")
    }
    assert curves["killed"] == curves["undisturbed"]
    # Of its 8 epochs 3 were kept, and the one in work may have been written just then.
    assert len(written) <= 6, "epochs with a checkpoint were trained again"
