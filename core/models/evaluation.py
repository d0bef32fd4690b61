"""A model judged once: every metric, with intervals, beside what no learning would reach.

Also the two fits on the validation split that make scores usable: a threshold for each class and
calibrated probabilities. Shapes: N pictures, C classes, M = N x C, K weights.
Decisions: the gain over the prior baseline has an interval of its own, so that a model that has
learnt nothing cannot be missed; thresholds and calibration never see the split they are judged on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..metrics import Array
from .intervals import Interval, bootstrap_interval, paired_bootstrap

TOP_K = 3
"""The k of `top3_accuracy`."""
MIN_SCALE = 1e-3
"""Least calibration scale per standard deviation of the logits: > 0, so that ranks stay."""


def best_thresholds(probs_NC: Array, targets_NC: Array) -> Tensor:
    """The threshold of each class with the best F1 on these pictures: float64 `[C]`.

    Halfway to the next lower probability, so that it suits unseen pictures; the higher one of
    equally good ones; 0.5 for a class without a positive. Use the validation split.
    """
    probs, targets, _ = metrics.check_scores(probs_NC, targets_NC, num_dims=2)
    thresholds = torch.full((probs.shape[1],), 0.5, dtype=torch.float64)
    for label in targets.any(0).nonzero()[:, 0].tolist():
        scores_N, order = torch.sort(probs[:, label].double(), descending=True)
        matched_N = targets[order, label].cumsum(0)
        predicted_N = torch.arange(1, len(order) + 1, device=order.device)
        f1_N = 2 * matched_N.double() / (predicted_N + matched_N[-1])
        # Equal probabilities are predicted together: only the last of them can be the cut.
        f1_N[:-1][scores_N[:-1] == scores_N[1:]] = -1
        cut = int(f1_N.argmax())
        upper = float(scores_N[cut])
        lower = float(scores_N[cut + 1]) if cut + 1 < len(scores_N) else 0.0
        middle = (upper + lower) / 2
        thresholds[label] = middle if lower < middle else upper
    return thresholds


def fit_calibration(logits_NC: Array, targets_NC: Array) -> tuple[float, float]:
    """(scale, bias), shared by all classes, so that sigmoid(scale * logit + bias) is calibrated.

    Platt scaling (Platt 1999) with his smoothed targets, by Newton's method as Lin, Lin & Weng
    (2007). Scale > 0 always, so that no rank changes. Use the validation split.
    """
    logits, targets, _ = metrics.check_scores(logits_NC, targets_NC, num_dims=2)
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite, but some are infinite")
    x_M = logits.double().flatten().cpu()
    num_positives = int(targets.sum())
    share = {1: (num_positives + 1) / (num_positives + 2), 0: 1 / (len(x_M) - num_positives + 2)}
    targets_M = share[0] + (share[1] - share[0]) * targets.flatten().cpu().double()
    if float(x_M.min()) == float(x_M.max()):
        # Constant logits say nothing about the scale.
        return 1.0, float(_fit_logistic(torch.ones_like(x_M)[:, None], x_M, targets_M)[0])
    spread = float(x_M.std())
    x_M = x_M / spread
    design_M2 = torch.stack([x_M, torch.ones_like(x_M)], 1)
    scale, bias = _fit_logistic(design_M2, torch.zeros_like(x_M), targets_M).tolist()
    if scale < MIN_SCALE:
        scale = MIN_SCALE
        bias = float(_fit_logistic(design_M2[:, 1:], scale * x_M, targets_M)[0])
    return scale / spread, bias


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """One class of an evaluation. NaN where the split has no positive of it."""

    name: str
    num_positives: int
    train_share: float
    """Share of the training pictures that carry the class."""
    recall_at_3: float
    average_precision: float
    threshold: float
    f1: float
    """At the threshold."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every metric of one model on one split; shares are in 0..1."""

    num_images: int
    num_labels: int
    top3_accuracy: Interval
    prior_baseline: float
    """top3_accuracy of always predicting the three commonest classes of training."""
    gain: Interval
    """top3_accuracy minus prior_baseline, on the same resamples."""
    macro_recall_at_3: float
    mean_average_precision: float
    micro_f1: float
    macro_f1: float
    exact_match: float
    coverage_error: float
    """Mean number of classes to predict, best first, to cover the true ones; 1..C."""
    calibration_error: float
    per_class: tuple[ClassResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON: floats by name (an interval as NAME, NAME_low, NAME_high) and `per_class`, a list
        of mappings with None for NaN."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Interval):
                values[field.name] = value.value
                values[f"{field.name}_low"] = value.low
                values[f"{field.name}_high"] = value.high
            elif field.name != "per_class":
                values[field.name] = float(value)
        values["per_class"] = [
            {k: None if v != v else v for k, v in dataclasses.asdict(row).items()}
            for row in self.per_class
        ]
        return values


def evaluate(
    probs_NC: Array,
    targets_NC: Array,
    *,
    class_names: Sequence[str],
    train_targets: Array,
    thresholds: Array | Sequence[float] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """All metrics of calibrated probabilities; called once a model on a split it did not see.

    `train_targets [N_train, C]` give the prior baseline; `thresholds [C]` default to 0.5 each.
    """
    probs, targets, _ = metrics.check_scores(probs_NC, targets_NC, num_dims=2)
    prior = metrics.prior_scores(train_targets).to(targets.device)
    if not len(class_names) == len(prior) == targets.shape[1]:
        raise ValueError(
            "class_names, train_targets and targets must have the same classes, but got "
            f"{len(class_names)}, {len(prior)} and {targets.shape[1]}"
        )
    limits = torch.tensor(
        [0.5] * len(prior) if thresholds is None else [float(t) for t in thresholds],
        dtype=torch.float64,
    )
    model_N = _matched(probs, targets)
    prior_N = _matched(prior.expand(len(targets), -1), targets)
    labels_N = targets.sum(1)
    rows = zip(
        class_names,
        targets.sum(0).tolist(),
        prior.tolist(),
        metrics.per_class_recall(probs, targets, TOP_K).tolist(),
        metrics.per_class_average_precision(probs, targets).tolist(),
        limits.tolist(),
        metrics.per_class_f1(probs, targets, limits).tolist(),
        strict=True,
    )
    names = [field.name for field in dataclasses.fields(ClassResult)]
    return Evaluation(
        num_images=len(targets),
        num_labels=int(labels_N.sum()),
        top3_accuracy=bootstrap_interval(model_N, labels_N, num_resamples=num_resamples, seed=seed),
        prior_baseline=metrics.prior_baseline(train_targets, targets, TOP_K),
        gain=paired_bootstrap(
            model_N, labels_N, prior_N, labels_N, num_resamples=num_resamples, seed=seed
        ),
        macro_recall_at_3=float(metrics.macro_recall(probs, targets, TOP_K)),
        mean_average_precision=float(metrics.mean_average_precision(probs, targets)),
        micro_f1=metrics.f1(probs, targets, limits, "micro"),
        macro_f1=metrics.f1(probs, targets, limits, "macro"),
        exact_match=metrics.exact_match(probs, targets, limits),
        coverage_error=metrics.coverage_error(probs, targets),
        calibration_error=metrics.calibration_error(probs, targets),
        per_class=tuple(ClassResult(**dict(zip(names, row, strict=True))) for row in rows),
    )


def learnt_nothing(evaluation: Evaluation) -> bool:
    """Whether the model may be no better than the prior baseline: the gain's low end is <= 0."""
    return evaluation.gain.low <= 0


def _matched(scores: Tensor, targets: Tensor) -> Tensor:
    """How many true labels of each picture are among its TOP_K classes: float64 `[N]`."""
    hits = metrics.topk_hits(scores, targets, TOP_K)
    matched_N = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    return matched_N.index_add_(0, hits.picture, hits.hit.double())


def _fit_logistic(design_MK: Tensor, offset_M: Tensor, targets_M: Tensor) -> Tensor:
    """Weights `[K]` of the least mean log loss of sigmoid(design @ weights + offset).

    Newton with halved steps; the loss is convex. Soft targets inside 0..1 keep the weights finite.
    """
    weights = design_MK.new_zeros(design_MK.shape[1])

    def loss_of(weights_K: Tensor) -> float:
        logits = design_MK @ weights_K + offset_M
        return float((torch.nn.functional.softplus(logits) - targets_M * logits).mean())

    loss = loss_of(weights)
    for _ in range(100):
        probs = torch.sigmoid(design_MK @ weights + offset_M)
        gradient = design_MK.T @ (probs - targets_M) / len(probs)
        curvature = (probs * (1 - probs))[:, None] * design_MK
        hessian = design_MK.T @ curvature / len(probs) + 1e-12 * torch.eye(len(weights)).double()
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while (next_loss := loss_of(weights - size * step)) > loss and size > 1e-10:
            size /= 2
        if math.isclose(next_loss, loss, rel_tol=1e-14) or next_loss > loss:
            break
        weights, loss = weights - size * step, next_loss
    return weights
