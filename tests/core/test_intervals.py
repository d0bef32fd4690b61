"""Bootstrap intervals against scipy, theory and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from core.models.intervals import bootstrap_interval, paired_bootstrap


def draw(seed: int, num_images: int = 300, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Matched and true labels of each picture, 1 to 3 labels each matched with chance `share`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 4, num_images)
    return rng.binomial(labels, share), labels


def ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int = -1) -> np.ndarray:
    return numerators.sum(axis) / denominators.sum(axis)


def test_interval_matches_scipys_percentile_bootstrap() -> None:
    matched, labels = draw(0)
    ours = bootstrap_interval(matched, labels, num_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (matched, labels),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.value == matched.sum() / labels.sum() and ours.level == 0.95
    assert ours.low == pytest.approx(theirs.low, abs=0.002)
    assert ours.high == pytest.approx(theirs.high, abs=0.002)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(400):
        interval = bootstrap_interval(*draw(seed, 200), level=0.8, num_resamples=300, seed=seed)
        covered += interval.low <= 0.5 <= interval.high
    # 320 of 400 expected, standard deviation 8; percentile intervals are a little short.
    assert 290 <= covered <= 350


def test_paired_difference_matches_scipy() -> None:
    a, labels = draw(1)
    b = np.minimum(labels, a + np.random.default_rng(2).integers(0, 2, len(a)))
    ours = paired_bootstrap(b, labels, a, labels, num_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (b, a, labels),
        lambda b, a, labels, axis=-1: ratio(b, labels, axis) - ratio(a, labels, axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert ours.value == pytest.approx((b.sum() - a.sum()) / labels.sum())
    assert ours.low == pytest.approx(theirs.low, abs=0.002)
    assert ours.high == pytest.approx(theirs.high, abs=0.002)


def test_paired_difference_of_equal_models_is_exactly_zero() -> None:
    matched, labels = draw(4)
    interval = paired_bootstrap(matched, labels, matched, labels)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)


def test_the_seed_alone_decides_the_interval() -> None:
    columns = draw(5)
    first = bootstrap_interval(*columns, seed=7)
    assert bootstrap_interval(*columns, seed=7) == first
    assert bootstrap_interval(*columns, seed=8) != first
    # Pinned: the resamples are the same on every platform.
    pinned = bootstrap_interval(np.array([1, 0, 2, 1]), np.array([2, 1, 3, 1]), num_resamples=50)
    assert (pinned.low, pinned.high) == pytest.approx((0.26875, 0.8))


def test_many_pictures_are_resampled_in_parts() -> None:
    matched, labels = draw(6, num_images=1_500_000)  # one resample a part
    interval = bootstrap_interval(matched, labels, num_resamples=4)
    assert interval.low <= interval.high
    # The spread of a mean over 3 million labels.
    assert interval.low == pytest.approx(0.5, abs=0.003)
    assert interval.high == pytest.approx(0.5, abs=0.003)


def test_resamples_without_any_label_are_left_out() -> None:
    interval = bootstrap_interval(np.array([1.0, 0, 0]), np.array([1.0, 0, 0]))
    assert (interval.low, interval.high) == (1, 1)


def test_wrong_columns_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of one length, but got \[\(3,\), \(2,\)\]"):
        bootstrap_interval(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="columns of one length"):
        bootstrap_interval(np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="denominators sum to 0"):
        bootstrap_interval(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(np.array([np.nan, 1]), np.ones(2))
    with pytest.raises(ValueError, match="denominators >= 0"):
        bootstrap_interval(np.ones(2), np.array([-1.0, 3.0]))
    with pytest.raises(ValueError, match="0 < level < 1 must hold, but got 95"):
        bootstrap_interval(np.ones(2), np.ones(2), level=95)
    with pytest.raises(ValueError, match="num_resamples >= 1 must hold, but got 0"):
        bootstrap_interval(np.ones(2), np.ones(2), num_resamples=0)
