"""Bootstrap intervals of ratios that are summed over pictures, such as top3_accuracy.

Shapes: N pictures, R resamples, K columns of numbers, numerator and denominator in turn.
Decisions: whole pictures are drawn, as labels of one picture are not independent; percentile
intervals (Efron & Tibshirani 1993); two models are compared on the same resamples; numpy's PCG64
makes an interval the same on every platform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..metrics import Array


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio or a difference of ratios with its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float
    """Share of resamples inside low..high, such as 0.95."""


def bootstrap_interval(
    numerators_N: Array,
    denominators_N: Array,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators) when pictures are drawn with replacement.

    For top3_accuracy: matched labels and true labels of each picture. The same seed and N give
    the same resamples. Resamples without any denominator are left out.
    """
    columns_N2 = _columns(numerators_N, denominators_N)
    sums_R2 = _resample(columns_N2, num_resamples, seed)
    return _interval(_ratio(columns_N2.sum(0)[None])[0], _ratio(sums_R2), level)


def paired_bootstrap(
    numerators_a_N: Array,
    denominators_a_N: Array,
    numerators_b_N: Array,
    denominators_b_N: Array,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ratio a minus ratio b, both of the same pictures and on the same resamples.

    Much narrower than the two intervals suggest when the models err on the same pictures.
    """
    columns_N4 = _columns(numerators_a_N, denominators_a_N, numerators_b_N, denominators_b_N)
    sums_R4 = _resample(columns_N4, num_resamples, seed)
    total_14 = columns_N4.sum(0)[None]
    value = _ratio(total_14[:, :2]) - _ratio(total_14[:, 2:])
    return _interval(value[0], _ratio(sums_R4[:, :2]) - _ratio(sums_R4[:, 2:]), level)


def _columns(*columns: Array) -> npt.NDArray[np.float64]:
    arrays = [np.asarray(c.cpu() if isinstance(c, Tensor) else c, np.float64) for c in columns]
    if any(a.shape != (len(arrays[0]),) or not len(a) for a in arrays):
        raise ValueError(f"expected columns of one length, but got {[a.shape for a in arrays]}")
    stacked = np.stack(arrays, 1)
    if not np.isfinite(stacked).all() or (stacked[:, 1::2] < 0).any():
        raise ValueError("numerators must be finite and denominators >= 0")
    if not (stacked[:, 1::2].sum(0) > 0).all():
        raise ValueError("the denominators sum to 0: there is nothing to count")
    return stacked


def _resample(
    columns_NK: npt.NDArray[np.float64], num_resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Column sums of `num_resamples` draws of N rows with replacement: `[R, K]`."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples >= 1 must hold, but got {num_resamples}")
    rng = np.random.default_rng(seed)
    num_rows = len(columns_NK)
    chunk = max(1, 2_000_000 // num_rows)  # bounds the memory: 16 MB of row numbers
    sums = []
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        rows = rng.integers(0, num_rows, (size, num_rows)) + num_rows * np.arange(size)[:, None]
        counts = np.bincount(rows.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        sums.append(counts @ columns_NK)
    return np.concatenate(sums)


def _ratio(sums_R2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Numerators over denominators; NaN where nothing was drawn that counts."""
    denominators = np.where(sums_R2[:, 1] > 0, sums_R2[:, 1], np.nan)
    return np.asarray(sums_R2[:, 0] / denominators)


def _interval(value: float, ratios_R: npt.NDArray[np.float64], level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"0 < level < 1 must hold, but got {level}")
    tail = (1 - level) / 2
    low, high = np.quantile(ratios_R[~np.isnan(ratios_R)], [tail, 1 - tail]).tolist()
    return Interval(value=float(value), low=low, high=high, level=level)
