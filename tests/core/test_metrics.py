"""Metrics against scikit-learn, torchmetrics and plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_average_precision,
    multilabel_coverage_error,
    multilabel_exact_match,
    multilabel_f1_score,
)

from core import metrics

# Shapes: H heads, N pictures, C classes.


def draw(seed: int = 0, num_images: int = 150, num_classes: int = 12) -> tuple[torch.Tensor, ...]:
    """Scores [N, C] in 0..1 that know something about the targets [N, C] (1 to 3 labels)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.zeros(num_images, num_classes, dtype=torch.uint8)
    for row in targets:
        count = int(torch.randint(1, 4, (), generator=generator))
        row[torch.randperm(num_classes, generator=generator)[:count]] = 1
    noise = torch.randn(num_images, num_classes, generator=generator)
    return torch.sigmoid(1.5 * targets + noise - 1), targets


def counted_by_hand(scores: torch.Tensor, targets: torch.Tensor, k: int) -> tuple[int, int]:
    """(matched, all true labels) as the seed counts them: one picture at a time."""
    matched = total = 0
    for row, truth in zip(scores.tolist(), targets.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
        true = {c for c, value in enumerate(truth) if value}
        matched += len(true & set(best))
        total += len(true)
    return matched, total


# ---------------------------------------------------------------- recall at k


@pytest.mark.parametrize("k", [1, 2, 3, 7, 12])
def test_topk_recall_is_the_seeds_count(k: int) -> None:
    scores, targets = draw()
    matched, total = counted_by_hand(scores, targets, k)
    recall = metrics.topk_recall(scores, targets, k)
    assert recall.dtype == torch.float64 and recall.shape == ()
    assert float(recall) == matched / total


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_topk_recall_with_ties_predicts_exactly_k(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(1, 6))
    num_classes = data.draw(st.integers(1, 7))
    k = data.draw(st.integers(1, num_classes))
    size = num_images * num_classes
    values = st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, float("inf")])
    scores = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)))
    labels = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(any))
    scores = scores.view(num_images, num_classes)
    targets = torch.tensor(labels).view(num_images, num_classes)
    matched, total = counted_by_hand(scores, targets, k)
    assert float(metrics.topk_recall(scores, targets, k)) == matched / total


def test_all_equal_scores_predict_the_first_k_classes() -> None:
    targets = np.eye(5, dtype=np.uint8)
    recall = metrics.per_class_recall(np.zeros((5, 5)), targets, 2)
    assert recall.tolist() == [1, 1, 0, 0, 0]


def test_leading_dimensions_are_separate_heads() -> None:
    heads = [draw(seed) for seed in range(6)]
    targets = heads[0][1]
    scores = torch.stack([scores for scores, _ in heads])
    scores[2] = (scores[2] * 4).round()  # a head full of ties beside heads without
    stacked = scores.view(2, 3, *scores.shape[1:])
    for function in (metrics.topk_recall, metrics.macro_recall, metrics.mean_average_precision):
        alone = torch.stack([function(s, targets) for s in scores])
        together = function(stacked, targets)
        assert together.shape == (2, 3)
        assert torch.equal(together.flatten(), alone)
    assert metrics.per_class_recall(stacked, targets).shape == (2, 3, 12)
    assert metrics.per_class_average_precision(stacked, targets).shape == (2, 3, 12)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_layout_in_memory_changes_nothing(k: int) -> None:
    scores, targets = draw()
    stack = torch.stack([scores, scores.flip(0), scores.flip(1)])
    expected = [counted_by_hand(s, targets, k)[0] for s in stack]
    for apart in (
        stack,
        stack.transpose(0, 1).contiguous().transpose(0, 1),  # heads
        stack.transpose(1, 2).contiguous().transpose(1, 2),  # classes
        torch.cat([stack, stack], -1)[..., : scores.shape[-1]],  # pictures
    ):
        matched = metrics.topk_recall(apart, targets, k) * int(targets.sum())
        assert matched.round().long().tolist() == expected


@pytest.mark.parametrize("k", [1, 3, 6])
def test_counting_equals_sorting(k: int) -> None:
    """What a CPU does and what other devices do, with few different scores: most are ties."""
    _, targets = draw()
    scores = torch.randint(3, (4, *targets.shape), generator=torch.Generator().manual_seed(0))
    picture, label = (targets == 1).nonzero(as_tuple=True)
    counted = metrics._compiled_hits(scores.float(), picture, label, k)
    assert torch.equal(counted, metrics._sorted_hits(scores, picture, label, k))
    assert 0 < counted.float().mean() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_dtype_of_scores_is_counted_alike(dtype: torch.dtype) -> None:
    _, targets = draw()
    scores = torch.randint(-100, 100, targets.shape).to(dtype)
    matched, total = counted_by_hand(scores, targets, 3)
    assert float(metrics.topk_recall(scores, targets, 3)) == matched / total


def test_read_only_arrays_and_gradients_are_accepted() -> None:
    scores, targets = draw()
    expected = float(metrics.topk_recall(scores, targets))
    frozen = scores.numpy().copy()
    frozen.flags.writeable = False
    assert float(metrics.topk_recall(frozen, targets.numpy().astype(float))) == expected
    recall = metrics.topk_recall(scores.clone().requires_grad_(), targets.bool())
    assert not recall.requires_grad and float(recall) == expected


def test_inputs_are_left_as_they_were() -> None:
    scores, targets = draw()
    before = scores.clone()
    metrics.topk_recall(scores, targets)
    metrics.mean_average_precision(scores, targets)
    assert torch.equal(scores, before)


def test_per_class_and_macro_recall_match_scikit_learn() -> None:
    scores, targets = draw(num_images=300)
    targets[:, 4] = 0
    predicted = np.zeros(targets.shape, dtype=int)
    np.put_along_axis(predicted, np.argsort(-scores.numpy(), 1)[:, :3], 1, 1)
    present = [c for c in range(12) if c != 4]
    recall = metrics.per_class_recall(scores, targets, 3)
    expected = sklearn.metrics.recall_score(targets, predicted, labels=present, average=None)
    assert recall[4].isnan()
    np.testing.assert_allclose(recall[present], expected)
    assert float(metrics.macro_recall(scores, targets, 3)) == pytest.approx(expected.mean())


# ---------------------------------------------------------------- prior baseline


def test_prior_baseline_predicts_the_commonest_classes_of_training() -> None:
    train = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 1, 0]])
    assert metrics.prior_scores(train).tolist() == [0.5, 0.75, 0.25, 0.25]
    test = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    # k = 2: classes 1 and 0. k = 3: class 2 before class 3, as they are equally common.
    assert metrics.prior_baseline(train, test, 2) == 2 / 4
    assert metrics.prior_baseline(train, test, 3) == 3 / 4


@pytest.mark.posters
def test_label_totals_and_prior_of_the_real_posters(posters_dir: Path) -> None:
    frame = pd.read_csv(posters_dir / "train.csv", keep_default_na=False)
    targets = frame.iloc[:, 2:].to_numpy(dtype=np.uint8)
    # The seed's log counts 14,361 training and 2,513 test labels of the whole set.
    totals = {7254: 14_361 + 2_513, 6156: 14_303}
    assert targets.shape[1] == 25 and targets.sum() == totals[len(targets)]
    rng = np.random.default_rng(0)
    priors = []
    for _ in range(100):
        order = rng.permutation(len(targets))
        cut = round(0.15 * len(order))
        test, train = targets[order[:cut]], targets[order[cut:]]
        priors.append(metrics.prior_baseline(train, test))
    assert np.mean(priors) == pytest.approx(0.463, abs=0.003)


# ---------------------------------------------------------------- average precision


@pytest.mark.parametrize("decimals", [None, 1], ids=["no ties", "ties"])
def test_average_precision_matches_scikit_learn(decimals: int | None) -> None:
    scores, targets = draw(num_images=300)
    targets[:, 7] = 0
    if decimals is not None:
        scores = scores.round(decimals=decimals)
    present = [c for c in range(12) if c != 7]
    average = metrics.per_class_average_precision(scores, targets)
    expected = [
        sklearn.metrics.average_precision_score(targets[:, c], scores[:, c]) for c in present
    ]
    assert average[7].isnan()
    np.testing.assert_allclose(average[present], expected)
    mean = float(metrics.mean_average_precision(scores, targets))
    assert mean == pytest.approx(np.mean(expected))


def test_mean_average_precision_matches_torchmetrics() -> None:
    scores, targets = draw()
    expected = multilabel_average_precision(scores, targets.long(), num_labels=12)
    assert float(metrics.mean_average_precision(scores, targets)) == pytest.approx(float(expected))


# ---------------------------------------------------------------- thresholded metrics


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_f1_and_exact_match_agree_with_torchmetrics(average: str, threshold: float) -> None:
    scores, targets = draw()
    ours = metrics.f1(scores, targets, threshold, average)  # type: ignore[arg-type]
    labels = targets.long()
    theirs = multilabel_f1_score(
        scores, labels, num_labels=12, threshold=threshold, average=average
    )
    assert ours == pytest.approx(float(theirs))
    theirs = multilabel_exact_match(scores, labels, num_labels=12, threshold=threshold)
    assert metrics.exact_match(scores, targets, threshold) == pytest.approx(float(theirs))


def test_each_class_has_its_own_threshold() -> None:
    scores, targets = draw()
    thresholds = np.linspace(0.1, 0.9, 12)
    predicted = scores.numpy() >= thresholds
    expected = sklearn.metrics.f1_score(targets, predicted, average=None, zero_division=0)
    np.testing.assert_allclose(metrics.per_class_f1(scores, targets, thresholds), expected)
    assert metrics.f1(scores, targets, thresholds, "macro") == pytest.approx(expected.mean())
    expected = sklearn.metrics.accuracy_score(targets, predicted)
    assert metrics.exact_match(scores, targets, thresholds) == pytest.approx(expected)


def test_macro_f1_leaves_out_classes_without_a_positive() -> None:
    targets = torch.tensor([[1, 0], [1, 0]])
    probs = torch.tensor([[0.9, 0.9], [0.2, 0.1]])
    f1 = metrics.per_class_f1(probs, targets)
    assert f1[0] == pytest.approx(2 / 3) and f1[1].isnan()
    assert metrics.f1(probs, targets, average="macro") == pytest.approx(2 / 3)
    assert metrics.f1(probs, targets, average="micro") == pytest.approx(2 / 4)


def test_a_probability_equal_to_its_threshold_predicts() -> None:
    targets = torch.tensor([[1, 0]])
    assert metrics.exact_match(torch.tensor([[0.5, 0.25]]), targets) == 1.0


# ---------------------------------------------------------------- coverage and calibration


@pytest.mark.parametrize("decimals", [None, 1], ids=["no ties", "ties"])
def test_coverage_error_matches_both_oracles(decimals: int | None) -> None:
    scores, targets = draw()
    targets[:5] = 0  # pictures without a label count 0
    if decimals is not None:
        scores = scores.round(decimals=decimals)
    coverage = metrics.coverage_error(scores, targets)
    expected = sklearn.metrics.coverage_error(targets, scores)
    assert coverage == pytest.approx(expected)
    expected = multilabel_coverage_error(scores, targets.long(), num_labels=12)
    assert coverage == pytest.approx(float(expected))


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_matches_torchmetrics(num_bins: int) -> None:
    scores, targets = draw(num_images=400)
    ours = metrics.calibration_error(scores, targets, num_bins)
    theirs = binary_calibration_error(
        scores.flatten(), targets.flatten().long(), n_bins=num_bins, norm="l1"
    )
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_calibration_error_of_certain_and_right_is_zero() -> None:
    targets = torch.eye(4)
    assert metrics.calibration_error(targets, targets) == 0
    assert metrics.calibration_error(1 - targets, targets) == 1


# ---------------------------------------------------------------- loud failures

FUNCTIONS = [
    metrics.topk_recall,
    metrics.per_class_recall,
    metrics.macro_recall,
    metrics.mean_average_precision,
    metrics.per_class_average_precision,
    metrics.f1,
    metrics.exact_match,
    metrics.coverage_error,
    metrics.calibration_error,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_nan_and_misfits_are_refused(function) -> None:  # type: ignore[no-untyped-def]
    scores, targets = draw()
    broken = scores.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="scores hold NaN: 1 of 1800 values"):
        function(broken, targets)
    with pytest.raises(ValueError, match=r"must agree, but got \(150, 11\) and \(150, 12\)"):
        function(scores[:, 1:], targets)
    with pytest.raises(ValueError, match="must be 0 or 1, but got 2"):
        function(scores, targets * 2)
    with pytest.raises(ValueError, match="no positive label: all 1800 are 0"):
        function(scores, targets * 0)
    with pytest.raises(ValueError, match="must not be empty"):
        function(scores[:0], targets[:0])


def test_a_diverged_head_gives_nan_when_allowed_and_only_there() -> None:
    scores, targets = draw()
    stack = torch.stack([scores, scores, scores])
    stack[1, 0, 0] = torch.nan
    for function in (metrics.topk_recall, metrics.macro_recall, metrics.mean_average_precision):
        with pytest.raises(ValueError, match="NaN"):
            function(stack, targets)
        values = function(stack, targets, allow_nan=True)
        alone = function(scores, targets)
        assert values[1].isnan() and values[0] == values[2] == alone


@pytest.mark.parametrize("k", [0, 13])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"1 <= k <= num_classes must hold, but got \(k={k}"):
        metrics.topk_recall(*draw(), k)


def test_wrong_thresholds_average_and_probabilities_are_refused() -> None:
    scores, targets = draw()
    with pytest.raises(ValueError, match="thresholds must be a number or"):
        metrics.f1(scores, targets, np.full(11, 0.5))
    with pytest.raises(ValueError, match="thresholds must be a number or"):
        metrics.f1(scores, targets, float("nan"))
    with pytest.raises(ValueError, match="average must be 'micro' or 'macro', but got 'samples'"):
        metrics.f1(scores, targets, 0.5, "samples")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1, but got .*2"):
        metrics.calibration_error(scores * 0 + 2, targets)
