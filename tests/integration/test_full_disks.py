"""A disk that is full, for the cache and for checkpoints: said clearly, and resumable with room."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tuner.studies.outcomes import OutcomeLog

from ..disks import small_disk
from .small_study import FINETUNES, NUM_FINETUNES, NUM_TRIALS, PROBES
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

MEGABYTE = 2**20


def _make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)


def test_a_full_cache_is_said_and_the_search_begins_with_room(tmp_path: Path) -> None:
    place = Workplace(tmp_path, PROBES.replace("image_size: 16", "image_size: 64"))
    with small_disk(place.home.cache, num_bytes=MEGABYTE):
        output = place.run(*place.search("one"), code=2)
        assert "error: " in output and "Traceback" not in output
        assert str(place.home.cache) in output and "TUNER_HOME" in output
        assert not place.folder("one").exists(), "the study's name is taken"
        _make_room(place.home.cache)
        place.run(*place.search("one"))
        place.check_whole("one", NUM_TRIALS)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_trial_without_room_for_a_checkpoint_ends_the_session(
    tmp_path: Path, workers: str
) -> None:
    """It has no end: with room, the next session goes on from the last checkpoint."""
    share = ("--workers-per-trial", workers)
    place = Workplace(tmp_path, FINETUNES)
    place.run(*place.search("undisturbed", "--model", "undisturbed", *share))
    checkpoints = place.home.root / "studies"
    kept = place.home.root / "kept"
    checkpoints.rename(kept)
    with small_disk(checkpoints, num_bytes=12 * MEGABYTE):
        output = place.run(*place.search("full", *share), code=2)
        assert "no room for a checkpoint" in output and "Traceback" not in output
        assert {state for state, *_ in place.values("full").values()} == {"RUNNING"}
        parent, children = place.runs("full")
        assert "RUNNING" not in {run.info.status for run in [parent, *children]}
        assert list((checkpoints / "full" / "checkpoints").glob("*/*.pt"))
        _make_room(checkpoints)
        place.run("resume", "full", *share)
        place.check_whole("full", NUM_FINETUNES)
        ended = OutcomeLog(place.folder("full")).read()
        undisturbed = OutcomeLog(kept / "undisturbed").read()
        for number, trial in undisturbed.items():
            assert ended[number].outcome.curve == trial.outcome.curve
