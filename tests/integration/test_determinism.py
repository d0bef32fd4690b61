"""With one worker a seed gives one study, the same in two homes; each trial comes again alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.studies.outcomes import OutcomeLog

from .small_study import PROBES
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TRIALS = 12


def _curves(place: Workplace) -> dict[int, tuple[str, tuple[dict[str, float], ...]]]:
    """Each trial's end and curve, to the last bit."""
    ended = OutcomeLog(place.folder("one")).read()
    return {n: (e.outcome.status, e.outcome.curve) for n, e in sorted(ended.items())}


def test_two_homes_agree_and_trials_come_again(tmp_path: Path) -> None:
    first = Workplace(tmp_path, PROBES)
    second = Workplace(tmp_path, PROBES, home=tmp_path / "another")
    for place in (first, second):
        place.run(*place.search("one", "--trials", str(NUM_TRIALS)))
    assert first.values("one") == second.values("one")
    curves = _curves(first)
    assert curves == _curves(second) and len(curves) == NUM_TRIALS
    before = {p: p.read_bytes() for p in first.folder("one").rglob("*.json*")}
    for status in ("complete", "pruned"):
        number = next(n for n, (found, _) in curves.items() if found == status)
        output = first.run("rerun", "one", str(number))
        assert f"trial {number}: equal" in output
    assert {p: p.read_bytes() for p in first.folder("one").rglob("*.json*")} == before
    output = second.run("rerun", "one", str(NUM_TRIALS), code=2)
    assert f"trial {NUM_TRIALS} has no recorded end in this home" in output
