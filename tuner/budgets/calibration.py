"""How fast things go on this machine, as the studies of this home found: `calibration.json`.

A number a thing (seconds a picture through a backbone, seconds an epoch of a head), the last KEPT
of each, learned from every study that ran; and pairs of what a line explains (a cohort's training
seconds -> the seconds it took in all). What is asked for comes with a factor: the truth is expected
between value / factor and value * factor. Names of things are made in `tuner.budgets.speeds`.
"""

from __future__ import annotations

import fcntl
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.encoding.shards import write_json
from core.errors import InputError

FILE = "calibration.json"
FORMAT = 1
KEPT = 20
"""Samples kept of each thing: the last ones, as machines change."""
LEAST_FACTOR = 1.25
"""Even of a thing measured often: other programs use the machine, too."""
FEW_FACTOR = 1.5
"""Of a thing measured once."""
MOST_FACTOR = 4.0

Sample = float | tuple[float, float]
Samples = dict[str, list[Sample]]
Note = tuple[str, Sample]
"""What one study found: a thing's name, and a number or a pair."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A positive number that is not quite known."""

    low: float
    value: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        """Both are wrong in the same way at worst: a busy machine slows everything."""
        return Estimate(
            low=self.low + other.low, value=self.value + other.value, high=self.high + other.high
        )

    def __mul__(self, times: float) -> Estimate:
        return Estimate(low=self.low * times, value=self.value * times, high=self.high * times)


def within(value: float, factor: float) -> Estimate:
    """An estimate that is right up to a factor >= 1."""
    return Estimate(low=value / factor, value=value, high=value * factor)


NOTHING = Estimate(low=0.0, value=0.0, high=0.0)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a thing takes in all, by the part of it that is known: fixed + slope * part."""

    fixed: float
    slope: float
    factor: float

    def __call__(self, part: float, times: float = 1.0) -> Estimate:
        """`times` such things, which take `part` together."""
        return within(self.fixed * times + self.slope * part, self.factor)


class Calibration:
    """What is known of this machine. `read_calibration` makes one."""

    def __init__(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        self._samples = {key: list(values) for key, values in samples.items()}

    def number(self, key: str) -> Estimate | None:
        """A thing's number; None if no study has met it."""
        values = [s for s in self._samples.get(key, []) if isinstance(s, float) and s > 0]
        if not values:
            return None
        middle = statistics.median(values)
        return within(middle, _factor([value / middle for value in values]))

    def numbers(self, prefix: str) -> dict[str, Estimate]:
        """All things whose names begin so, without those of pairs."""
        found = {key: self.number(key) for key in self._samples if key.startswith(prefix)}
        return {key: number for key, number in found.items() if number is not None}

    def line(self, key: str) -> Line | None:
        """The line through a thing's pairs; None if no study has met it."""
        pairs = [s for s in self._samples.get(key, []) if not isinstance(s, float)]
        return fit_line(pairs) if pairs else None

    def with_notes(self, notes: Iterable[Note]) -> Calibration:
        """With what was found since; of each thing the last KEPT samples."""
        samples: Samples = {key: list(values) for key, values in self._samples.items()}
        for key, sample in notes:
            samples.setdefault(key, []).append(sample)
        return Calibration({key: values[-KEPT:] for key, values in samples.items()})

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        speeds = {
            key: [s if isinstance(s, float) else list(s) for s in values]
            for key, values in sorted(self._samples.items())
        }
        return {"format": FORMAT, "speeds": speeds}


def read_calibration(root: Path) -> Calibration:
    """What the studies of a home have found; nothing if none has. Raises InputError for a file
    that is damaged."""
    path = root / FILE
    if not path.exists():
        return Calibration({})
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} is not {FORMAT}")
        return Calibration(
            {key: [_sample(s) for s in samples] for key, samples in values["speeds"].items()}
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"is damaged ({error})",
            where=str(path),
            hint="remove it: the next study learns the speeds of this machine again",
        ) from error


def learn(root: Path, notes: Sequence[Note]) -> None:
    """Add what a study found. Studies that end at the same moment take turns."""
    if not notes:
        return
    with (root / f".{FILE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(root / FILE, read_calibration(root).with_notes(notes).to_dict())


def fit_line(pairs: Sequence[tuple[float, float]]) -> Line:
    """The line of least relative error, neither of whose terms is negative. Pairs that lie
    together, or a single one, say nothing of the slope: it is 1 then, and the rest is fixed."""
    x, y = np.array(pairs, dtype=float).T
    weight = 1 / np.maximum(y, 1e-9)
    fixed, slope = max(0.0, float(np.median(y - x))), 1.0
    if len(pairs) > 2 and x.max() > 2 * max(float(x.min()), 1e-9):
        columns = np.stack([weight, weight * x], axis=1)
        (fixed, slope), *_ = np.linalg.lstsq(columns, weight * y, rcond=None)
        if fixed < 0:
            fixed, slope = 0.0, float(np.sum(weight**2 * x * y) / np.sum((weight * x) ** 2))
        elif slope < 0:
            fixed, slope = float(np.median(y)), 0.0
    fitted = np.maximum(fixed + slope * x, 1e-9)
    return Line(fixed=float(fixed), slope=float(slope), factor=_factor(list(y / fitted)))


def _factor(ratios: Sequence[float]) -> float:
    """How far the next one may be off, from how far the others were: two standard deviations of
    the logarithms, within sense."""
    if len(ratios) < 2:
        return FEW_FACTOR
    logarithms = [math.log(max(float(ratio), 1e-6)) for ratio in ratios]
    spread = math.sqrt(sum(value**2 for value in logarithms) / (len(logarithms) - 1))
    return min(MOST_FACTOR, max(LEAST_FACTOR, math.exp(2 * spread)))


def _sample(value: object) -> Sample:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, list) and len(value) == 2:
        return float(value[0]), float(value[1])
    raise ValueError(f"{value!r} is no sample")
