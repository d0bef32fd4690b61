"""Feature scaling against scikit-learn. N rows, D features, P places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from core.encoding.inputs import HeadInputs, feature_statistics

N, D, P = 1100, 7, 4  # more rows than a block of the statistics
TRAIN = np.random.default_rng(1).permutation(N)[:700].astype(np.int64)


def _features(*, spatial: bool, dtype: str = "float32") -> np.ndarray:
    shape = (N, P, D) if spatial else (N, D)
    values = np.random.default_rng(0).normal(3.0, 2.0, shape) * np.arange(1, D + 1)
    values[..., 0] = 0.1  # a feature that never changes
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("spatial", [False, True])
def test_statistics_are_sklearns(spatial: bool, dtype: str) -> None:
    features = _features(spatial=spatial, dtype=dtype)
    scaler = StandardScaler().fit(features[TRAIN].reshape(-1, D).astype(np.float64))
    mean_D, deviation_D = feature_statistics(features, TRAIN)
    assert mean_D.dtype == deviation_D.dtype == torch.float32
    np.testing.assert_allclose(mean_D, scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(deviation_D, scaler.scale_, rtol=1e-6)
    assert deviation_D[0] == 1


def test_a_large_mean_does_not_drown_the_spread() -> None:
    features = np.random.default_rng(0).normal(1000.0, 0.01, (N, 3))
    _, deviation_D = feature_statistics(features, TRAIN)
    np.testing.assert_allclose(deviation_D, features[TRAIN].std(0), rtol=1e-3)


@pytest.mark.parametrize("spatial", [False, True])
def test_batches_are_scaled_rows(spatial: bool) -> None:
    features = _features(spatial=spatial, dtype="float16" if spatial else "float32")
    kept = features.copy()
    inputs = HeadInputs(features, norm="standardize", train_rows=TRAIN, device="cpu")
    assert (inputs.num_features, inputs.num_places) == (D, P if spatial else 1)
    scaler = StandardScaler().fit(features[TRAIN].reshape(-1, D).astype(np.float64))
    rows = np.array([5, 3, 1099, 3])
    for _ in range(2):  # asking again gives the same, not twice scaled
        batch = inputs.batch(rows)
        assert batch.dtype == torch.float32
        expected = scaler.transform(features[rows].reshape(-1, D).astype(np.float64))
        np.testing.assert_allclose(
            batch.numpy(), expected.reshape(features[rows].shape), rtol=1e-4, atol=1e-5
        )
    assert np.array_equal(features, kept)


@pytest.mark.parametrize("spatial", [False, True])
def test_without_scaling_batches_are_the_rows(spatial: bool) -> None:
    features = _features(spatial=spatial)
    inputs = HeadInputs(features, norm="none", train_rows=TRAIN, device="cpu")
    rows = np.array([2, 0])
    assert inputs.mean_D is None
    assert inputs.deviation_D is None
    assert np.array_equal(inputs.batch(rows).numpy(), features[rows])


@pytest.mark.parametrize("spatial", [False, True])
def test_rows_outside_training_do_not_count(spatial: bool) -> None:
    features = _features(spatial=spatial)
    before = feature_statistics(features, TRAIN)
    others = np.setdiff1d(np.arange(N), TRAIN)
    features[others] = 1e6
    for old, new in zip(before, feature_statistics(features, TRAIN), strict=True):
        assert torch.equal(old, new)


def test_read_only_memory_maps_are_served(tmp_path) -> None:
    np.save(tmp_path / "features.npy", _features(spatial=True))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    inputs = HeadInputs(mapped, norm="standardize", train_rows=TRAIN, device="cpu")
    assert inputs.batch(np.array([4])).shape == (1, P, D)
