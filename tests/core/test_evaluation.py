"""Thresholds, calibration and the evaluation of a model, against scikit-learn and brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from core import metrics
from core.models.evaluation import (
    MIN_SCALE,
    best_thresholds,
    evaluate,
    fit_calibration,
    learnt_nothing,
)

# Shapes: N pictures, C classes.
CLASSES = ("Action", "Comedy", "Drama", "Horror", "N/A", "War")


def draw(
    seed: int = 0, num_images: int = 400, signal: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets [N, 6]: classes of different frequency, logits that know `signal`."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.6, 0.5, 0.4, 0.2, 0.1, 0.05])
    targets = (torch.rand(num_images, 6, generator=generator) < shares).to(torch.uint8)
    noise = torch.randn(num_images, 6, generator=generator)
    return signal * targets + shares.logit() + noise - signal / 2, targets


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize("decimals", [None, 1], ids=["no ties", "ties"])
def test_thresholds_reach_the_best_f1_of_all(decimals: int | None) -> None:
    logits, targets = draw(num_images=120)
    probs = logits.sigmoid()
    if decimals is not None:
        probs = probs.round(decimals=decimals)
    thresholds = best_thresholds(probs, targets)
    assert thresholds.dtype == torch.float64 and thresholds.shape == (6,)
    reached = metrics.per_class_f1(probs, targets, thresholds)
    for c in range(6):
        candidates = probs[:, c].unique().tolist()
        scores = [f1_score(targets[:, c], probs[:, c].double() >= t) for t in candidates]
        assert float(reached[c]) == pytest.approx(max(scores))


def test_threshold_lies_halfway_to_the_next_lower_probability() -> None:
    probs = torch.tensor([[0.9], [0.75], [0.25], [0.0]], dtype=torch.float64)
    assert best_thresholds(probs, torch.tensor([[1], [1], [0], [0]])).tolist() == [0.5]
    # All positive: everything is predicted, and a lower probability would be, too.
    assert best_thresholds(probs[:3], torch.ones(3, 1)).tolist() == [0.125]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbouring_probabilities_are_told_apart(dtype: type[np.floating]) -> None:
    targets = np.array([[0], [1]])
    low = dtype(0.3)
    for _ in range(2):  # the mean of two neighbours rounds to one, then to the other
        high = np.nextafter(low, dtype(1))
        probs = np.array([[low], [high]])
        assert metrics.f1(probs, targets, best_thresholds(probs, targets)) == 1
        low = high


def test_a_class_without_a_positive_gets_one_half() -> None:
    logits, targets = draw()
    targets[:, 2] = 0
    assert best_thresholds(logits.sigmoid(), targets)[2] == 0.5


# ---------------------------------------------------------------- calibration


def platt_oracle(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Scale and bias by scikit-learn: soft targets are a positive and a negative with weights."""
    x, y = logits.double().flatten().numpy(), targets.flatten().numpy()
    positives, negatives = (y == 1).sum(), (y == 0).sum()
    soft = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    model.fit(
        np.concatenate([x, x])[:, None],
        np.repeat([1, 0], len(x)),
        sample_weight=np.concatenate([soft, 1 - soft]),
    )
    return float(model.coef_[0, 0]), float(model.intercept_[0])


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (50, 7), (0.02, -3)])
def test_calibration_matches_scikit_learn(scale: float, shift: float) -> None:
    logits, targets = draw()
    logits = scale * logits + shift
    assert fit_calibration(logits, targets) == pytest.approx(
        platt_oracle(logits, targets), rel=1e-4
    )


def test_calibration_mends_overconfident_logits() -> None:
    logits, targets = draw(num_images=2000, signal=1.0)
    fitted = fit_calibration(6 * logits[:1000] + 5, targets[:1000])
    raw = 6 * logits[1000:] + 5
    mended = torch.sigmoid(fitted[0] * raw + fitted[1])
    assert metrics.calibration_error(raw.sigmoid(), targets[1000:]) > 0.15
    assert metrics.calibration_error(mended, targets[1000:]) < 0.02
    assert torch.equal(
        metrics.topk_recall(mended, targets[1000:]), metrics.topk_recall(raw, targets[1000:])
    )


def test_separable_logits_keep_a_finite_scale() -> None:
    targets = torch.tensor([[1, 0], [0, 1]])
    scale, bias = fit_calibration(targets * 2.0 - 1, targets)
    # Platt's soft targets: (2 + 1) / (2 + 2) for positives, so logit(3/4) at the logit 1.
    assert scale == pytest.approx(np.log(3)) and bias == pytest.approx(0, abs=1e-9)


def test_logits_that_point_the_wrong_way_keep_their_order() -> None:
    logits, targets = draw()
    scale, bias = fit_calibration(-logits, targets)
    assert scale == pytest.approx(MIN_SCALE / float(logits.double().std()))
    mean = torch.sigmoid(scale * -logits.double() + bias).mean()
    assert float(mean) == pytest.approx(float(targets.double().mean()), abs=1e-3)


def test_constant_logits_give_the_share_of_positives() -> None:
    _, targets = draw()
    scale, bias = fit_calibration(torch.full(targets.shape, 4.0), targets)
    assert scale == 1
    share = float(torch.sigmoid(torch.tensor(4 + bias)))
    assert share == pytest.approx(float(targets.double().mean()), abs=1e-3)


def test_infinite_logits_are_refused() -> None:
    logits, targets = draw()
    logits[0, 0] = torch.inf
    with pytest.raises(ValueError, match="logits must be finite"):
        fit_calibration(logits, targets)


# ---------------------------------------------------------------- evaluate


def test_evaluation_agrees_with_the_single_metrics() -> None:
    logits, targets = draw()
    probs, thresholds = logits.sigmoid(), torch.linspace(0.2, 0.7, 6)
    _, train = draw(1)
    result = evaluate(
        probs, targets, class_names=CLASSES, train_targets=train, thresholds=thresholds
    )
    assert (result.num_images, result.num_labels) == (400, int(targets.sum()))
    assert result.top3_accuracy.value == float(metrics.topk_recall(probs, targets, 3))
    assert result.top3_accuracy.low < result.top3_accuracy.value < result.top3_accuracy.high
    assert result.prior_baseline == metrics.prior_baseline(train, targets, 3)
    gain = result.top3_accuracy.value - result.prior_baseline
    assert result.gain.value == pytest.approx(gain)
    assert result.gain.low < gain < result.gain.high
    assert result.micro_f1 == metrics.f1(probs, targets, thresholds, "micro")
    assert result.macro_f1 == metrics.f1(probs, targets, thresholds, "macro")
    assert result.exact_match == metrics.exact_match(probs, targets, thresholds)
    assert result.macro_recall_at_3 == float(metrics.macro_recall(probs, targets, 3))
    assert result.mean_average_precision == float(metrics.mean_average_precision(probs, targets))
    assert tuple(row.name for row in result.per_class) == CLASSES
    row = result.per_class[3]
    assert row.num_positives == int(targets[:, 3].sum())
    assert row.train_share == pytest.approx(float(train[:, 3].double().mean()))
    assert row.threshold == pytest.approx(0.5)
    assert row.f1 == pytest.approx(f1_score(targets[:, 3], probs[:, 3] >= 0.5))
    average = metrics.per_class_average_precision(probs, targets)
    assert row.average_precision == float(average[3])
    assert row.recall_at_3 == float(metrics.per_class_recall(probs, targets)[3])


def test_to_dict_is_json_of_floats_and_a_table() -> None:
    logits, targets = draw()
    targets[:, 5] = 0
    result = evaluate(logits.sigmoid(), targets, class_names=CLASSES, train_targets=targets)
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    table = values.pop("per_class")
    assert all(type(value) is float for value in values.values())
    assert values["top3_accuracy_low"] == result.top3_accuracy.low
    assert values["gain_high"] == result.gain.high
    assert [row["name"] for row in table] == list(CLASSES)
    assert table[5]["average_precision"] is None and table[5]["num_positives"] == 0
    assert table[4]["name"] == "N/A" and table[4]["average_precision"] > 0


def test_a_model_that_has_learnt_nothing_is_called_out() -> None:
    _, train = draw(1)
    logits, targets = draw(0)
    noise, _ = draw(2, signal=0.0)
    prior = metrics.prior_scores(train).expand(400, -1)

    def judge(probs: torch.Tensor) -> bool:
        result = evaluate(probs, targets, class_names=CLASSES, train_targets=train)
        return learnt_nothing(result)

    assert not judge(logits.sigmoid())
    assert judge(prior)
    assert judge(noise.sigmoid())
    assert judge(1 - logits.sigmoid())


def test_a_gain_within_the_noise_is_not_learning() -> None:
    _, train = draw(1)
    logits, targets = draw(9, num_images=60, signal=0.8)
    result = evaluate(logits.sigmoid(), targets, class_names=CLASSES, train_targets=train)
    assert result.gain.low <= 0 < result.gain.value
    assert learnt_nothing(result)


def test_pictures_without_a_label_count_for_nothing() -> None:
    logits, targets = draw()
    targets[:50] = 0
    result = evaluate(logits.sigmoid(), targets, class_names=CLASSES, train_targets=targets)
    rest = evaluate(logits[50:].sigmoid(), targets[50:], class_names=CLASSES, train_targets=targets)
    assert result.num_images == 400
    assert result.top3_accuracy.value == rest.top3_accuracy.value


def test_evaluation_refuses_what_does_not_fit() -> None:
    logits, targets = draw()
    probs = logits.sigmoid()
    with pytest.raises(ValueError, match="the same classes, but got 2, 6 and 6"):
        evaluate(probs, targets, class_names=("a", "b"), train_targets=targets)
    with pytest.raises(ValueError, match="the same classes, but got 6, 5 and 6"):
        evaluate(probs, targets, class_names=CLASSES, train_targets=targets[:, 1:])
    with pytest.raises(ValueError, match="thresholds must be a number or"):
        evaluate(probs, targets, class_names=CLASSES, train_targets=targets, thresholds=[0.5] * 5)
    with pytest.raises(ValueError, match=r"probabilities must lie in 0\.\.1"):
        evaluate(logits, targets, class_names=CLASSES, train_targets=targets)
    with pytest.raises(ValueError, match="scores hold NaN"):
        evaluate(probs * torch.nan, targets, class_names=CLASSES, train_targets=targets)
