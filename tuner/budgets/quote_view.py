"""A quote in words: before the start, and beside the truth at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..views.steps import duration
from .calibration import Estimate
from .device_time import BUSY, WALL, Seconds, busy_seconds, hours_text, used_by
from .quote import PartQuote, Quote

if TYPE_CHECKING:
    from ..studies.study import Study
    from .prices import Features

FILE = "quote.json"
"""In a study's folder: what was said when its last session started, and what had been used."""


def range_text(seconds: Estimate) -> str:
    """`12 min 0 s (8 min 0 s to 20 min 0 s)`."""
    return f"{duration(seconds.value)} ({duration(seconds.low)} to {duration(seconds.high)})"


def hours_range(seconds: Estimate) -> str:
    """`0.2 (0.14 to 0.31)`, in hours."""
    low, value, high = (hours_text(s) for s in (seconds.low, seconds.value, seconds.high))
    return f"{value} ({low} to {high})"


def quote_line(quote: Quote) -> str:
    """What is said when a study starts."""
    trials = " and ".join(trials_text(part) for part in quote.parts)
    return (
        f"expected: {trials} in {range_text(quote.seconds)}, "
        f"{hours_range(quote.device_seconds)} device-hours"
    )


def trials_text(part: PartQuote) -> str:
    """`200 trials`, or how many of them fit a budget of time."""
    if part.trials == part.wanted:
        return f"{part.wanted} trials"
    return f"about {part.trials} of {part.wanted} trials"


def features_text(features: Features, seconds: Estimate) -> str:
    """A matrix, and what it still takes."""
    label, missing = features.request.label, features.num_images - features.num_cached
    if not missing:
        return f"{label}: cached"
    cached = f", {features.num_cached:,} cached" if features.num_cached else ""
    return f"{label}: {missing:,} pictures{cached}, {range_text(seconds)}"


def refused_text(refused: Estimate | None) -> str:
    """Trials that end untrained: `about 12 (0 to 20) trials end untrained, in no time`."""
    if refused is None:
        return "not known before costs are measured: all trials are counted as trained"
    low, value, high = (round(number) for number in (refused.low, refused.value, refused.high))
    return f"about {value} ({low} to {high}) of the trials end untrained, and take no time"


def quote_rows(quote: Quote) -> list[tuple[str, str]]:
    """Names and values for a dry run."""
    rows = []
    for part in quote.parts:
        name = "" if len(quote.parts) == 1 else f", {part.mode}"
        if part.num_measured:
            kinds = f"costs of {part.num_measured} kinds of models take"
            rows.append((f"{kinds}{name}", range_text(part.measuring)))
        rows.append((f"features take{name}", range_text(part.extraction)))
        rows.append((f"{trials_text(part)} take{name}", range_text(part.training)))
        if part.refused is None or part.refused.high:
            rows.append((f"refused by constraints{name}", refused_text(part.refused)))
    rows.append(("finalists take", range_text(quote.finalists)))
    rows.append(("in all", range_text(quote.seconds)))
    rows.append(("device-hours", hours_range(quote.device_seconds)))
    return rows


def truth_text(studies: Sequence[Study]) -> str:
    """What a study's parts took over all sessions, beside what was said when the last began; empty
    for a study that nobody measured."""
    sums: Seconds = {}
    for study in studies:
        for kind, seconds in used_by(study).items():
            sums[kind] = sums.get(kind, 0.0) + seconds
    if not busy_seconds(sums):
        return ""
    kinds = ", ".join(f"{kind} {duration(sums[kind])}" for kind in BUSY if sums.get(kind))
    text = f"device-hours: {hours_text(busy_seconds(sums))} ({kinds})"
    said = _said(studies[0])
    if said is not None:
        text += f"; expected {hours_range(_total(said, 'device_seconds'))}"
    if WALL in sums:
        text += f"\ntime in all: {duration(sums[WALL])}"
        if said is not None:
            text += f"; expected {range_text(_total(said, 'seconds'))}"
    return text


def _said(study: Study) -> dict[str, Any] | None:
    path = study.folder / FILE
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _total(said: dict[str, Any], name: str) -> Estimate:
    """What was expected of the session, with what had been used before it."""
    low, value, high = (seconds + said[f"{name}_before"] for seconds in said[name])
    return Estimate(low=low, value=value, high=high)
