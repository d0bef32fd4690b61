"""Metrics of multi-label scores, exact and batched over the heads of a cohort.

Shapes: N pictures, C classes, P positive labels (the ones of the targets); `...` leading
dimensions such as H heads. Where only the order of scores counts, logits do as well.
Decisions: exactly k classes are predicted for a picture, equal scores going to the lower class
first; macro averages run over the classes with at least one positive label; sums are counts,
divided once in float64; NaN and shapes that do not fit raise ValueError.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = Tensor | npt.NDArray[Any]

JUDGED_POSITIVES = 10
"""Positive labels from which on a class is judged by itself."""


def topk_recall(scores: Array, targets: Array, k: int = 3, *, allow_nan: bool = False) -> Tensor:
    """Matched labels over all true labels when the k best classes of each picture are predicted.

    With k = 3 this is the seed's accuracy (`top3_accuracy`): micro recall at 3.

    Args:
        scores: `[..., N, C]`; higher means likelier.
        targets: `[N, C]`, 0 or 1, with at least one 1.
        k: classes predicted for a picture, 1..C.
        allow_nan: give NaN for a leading entry (a head) with a NaN score instead of raising, so
            that one diverged head of a cohort does not stop the others.

    Returns:
        float64 of the leading shape (a scalar tensor for `[N, C]`), each in 0..1.
    """
    hits = topk_hits(scores, targets, k, allow_nan=allow_nan)
    recall = hits.hit.sum(-1, dtype=torch.float64) / len(hits.picture)
    return recall.masked_fill(hits.diverged, torch.nan)


def per_class_recall(
    scores: Array, targets: Array, k: int = 3, *, allow_nan: bool = False
) -> Tensor:
    """Recall at k of each class: float64 `[..., C]`, NaN for a class without a positive label."""
    hits = topk_hits(scores, targets, k, allow_nan=allow_nan)
    matched = hits.hit.new_zeros((*hits.hit.shape[:-1], scores.shape[-1]), dtype=torch.float64)
    matched.index_add_(-1, hits.label, hits.hit.to(torch.float64))
    recall = matched / torch.bincount(hits.label, minlength=scores.shape[-1])
    return recall.masked_fill(hits.diverged[..., None], torch.nan)


def worst_class_recall(
    scores: Array, targets: Array, k: int = 3, *, min_positives: int = JUDGED_POSITIVES
) -> float | None:
    """The lowest `per_class_recall` of scores [N, C] among the classes with at least
    `min_positives` positive labels, as fewer say little; None if there is no such class."""
    recalls_C = per_class_recall(scores, targets, k)
    judged = as_targets(targets).sum(0) >= min_positives
    return float(recalls_C[judged.to(recalls_C.device)].min()) if bool(judged.any()) else None


def macro_recall(scores: Array, targets: Array, k: int = 3, *, allow_nan: bool = False) -> Tensor:
    """Mean of `per_class_recall` over the classes with a positive label: the leading shape."""
    return per_class_recall(scores, targets, k, allow_nan=allow_nan).nanmean(-1)


class Hits(NamedTuple):
    """Which true labels are among the k predicted ones; labels ordered by picture, then class."""

    hit: Tensor
    """bool `[..., P]`: the label's class is predicted."""
    picture: Tensor
    """int64 `[P]`: the label's picture, 0..N-1."""
    label: Tensor
    """int64 `[P]`: the label's class, 0..C-1."""
    diverged: Tensor
    """bool `[...]`: a score of this leading entry is NaN (only with `allow_nan`)."""


def topk_hits(scores: Array, targets: Array, k: int = 3, *, allow_nan: bool = False) -> Hits:
    """For each true label, whether it is among the k best classes of its picture; arguments as for
    `topk_recall`."""
    scores, targets, diverged = check_scores(scores, targets, allow_nan=allow_nan)
    num_classes = scores.shape[-1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"1 <= k <= num_classes must hold, but got ({k=}, {num_classes=})")
    picture, label = targets.nonzero(as_tuple=True)
    find = _compiled_hits if scores.device.type == "cpu" else _sorted_hits
    return Hits(find(scores, picture, label, k), picture, label, diverged)


def _sorted_hits(scores: Tensor, picture_P: Tensor, label_P: Tensor, k: int) -> Tensor:
    # Stable: of equal scores the lower class comes first.
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    predicted = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return predicted[..., picture_P, label_P]


def _compiled_hits(scores: Tensor, picture_P: Tensor, label_P: Tensor, k: int) -> Tensor:
    from .kernels.ranks import find_hits  # Predicting needs no compiler, and no wait for one.

    scores_HNC = scores.reshape(-1, *scores.shape[-2:])
    num_heads, num_pictures, num_classes = scores_HNC.shape
    head_stride, picture_stride, class_stride = scores_HNC.stride()
    if class_stride != 1 or 0 in scores_HNC.stride():
        scores_HNC = scores_HNC.contiguous()
        head_stride, picture_stride, _ = scores_HNC.stride()
    size = (num_heads - 1) * head_stride + (num_pictures - 1) * picture_stride + num_classes
    hit_HP = torch.empty(num_heads, len(picture_P), dtype=torch.bool)
    find_hits(
        scores_HNC.as_strided((size,), (1,)).numpy(),
        head_stride,
        picture_stride,
        num_classes,
        picture_P.numpy(),
        label_P.numpy(),
        k,
        hit_HP.numpy(),
    )
    return hit_HP.view(*scores.shape[:-2], len(picture_P))


def prior_scores(train_targets: Array) -> Tensor:
    """The share of the training pictures that carry each class: float64 `[C]`."""
    return as_targets(train_targets).to(torch.float64).mean(0)


def prior_baseline(train_targets: Array, targets: Array, k: int = 3) -> float:
    """`topk_recall` on `targets` of always predicting the k commonest classes of training."""
    targets = as_targets(targets)
    scores = prior_scores(train_targets).to(targets.device)
    return float(topk_recall(scores.expand(len(targets), -1), targets, k))


def per_class_average_precision(
    scores: Array, targets: Array, *, allow_nan: bool = False
) -> Tensor:
    """Average precision of each class: float64 `[..., C]`, NaN for a class without a positive.

    The area under the precision-recall steps as in scikit-learn: the mean, over the positive
    pictures, of the precision among the pictures that score at least as high. Equal scores share
    one step. Counts come from binary search in sorted scores, class by class.
    """
    scores, targets, diverged = check_scores(scores, targets, allow_nan=allow_nan)
    average = scores.new_full((*scores.shape[:-2], scores.shape[-1]), torch.nan).double()
    for label in targets.any(0).nonzero()[:, 0].tolist():
        scores_N = scores[..., label].contiguous()
        everyone = _sorted(scores_N)
        positives = _sorted(scores_N[..., targets[:, label]])
        above = everyone.shape[-1] - torch.searchsorted(everyone, positives)
        matched = positives.shape[-1] - torch.searchsorted(positives, positives)
        average[..., label] = (matched.to(torch.float64) / above).mean(-1)
    return average.masked_fill(diverged[..., None], torch.nan)


def mean_average_precision(scores: Array, targets: Array, *, allow_nan: bool = False) -> Tensor:
    """mAP: the mean of `per_class_average_precision` over the classes with at least one positive.

    Scores `[..., N, C]`, targets `[N, C]`; float64 of the leading shape.
    """
    return per_class_average_precision(scores, targets, allow_nan=allow_nan).nanmean(-1)


def per_class_f1(probs: Array, targets: Array, thresholds: Array | float = 0.5) -> Tensor:
    """F1 of each class when a probability >= its threshold predicts it: float64 `[C]`.

    `thresholds` is one number or `[C]`. A class without a positive label gives NaN.
    """
    targets = as_targets(targets)
    predicted = predict(probs, targets, thresholds)
    positives = targets.sum(0)
    f1 = 2 * (predicted & targets).sum(0, dtype=torch.float64) / (predicted.sum(0) + positives)
    return f1.masked_fill(positives == 0, torch.nan)


def f1(
    probs: Array,
    targets: Array,
    thresholds: Array | float = 0.5,
    average: Literal["micro", "macro"] = "micro",
) -> float:
    """F1 over all labels at once (`micro`), or the mean over classes with a positive (`macro`)."""
    if average == "macro":
        return float(per_class_f1(probs, targets, thresholds).nanmean())
    if average != "micro":
        raise ValueError(f"average must be 'micro' or 'macro', but got {average!r}")
    targets = as_targets(targets)
    predicted = predict(probs, targets, thresholds)
    return 2 * int((predicted & targets).sum()) / int(predicted.sum() + targets.sum())


def exact_match(probs: Array, targets: Array, thresholds: Array | float = 0.5) -> float:
    """The share of the pictures whose set of predicted classes is the true set: 0..1."""
    targets = as_targets(targets)
    same = (predict(probs, targets, thresholds) == targets).all(-1)
    return int(same.sum()) / len(same)


def predict(probs: Array, targets: Array, thresholds: Array | float) -> Tensor:
    """Which classes are predicted, bool `[N, C]`: a probability >= the threshold of its class."""
    scores, _, _ = check_scores(probs, targets, num_dims=2)
    limits = _tensor(thresholds).to(scores.device, torch.float64)
    if limits.shape not in ((), scores.shape[-1:]) or bool(limits.isnan().any()):
        raise ValueError(f"thresholds must be a number or [C], not NaN, but got {thresholds!r}")
    return scores.double() >= limits


def coverage_error(scores: Array, targets: Array) -> float:
    """How many classes, best first, must be predicted to cover all true ones: the mean over N.

    As in scikit-learn (Tsoumakas et al. 2010): equal scores count against; a picture without a
    label counts 0.
    """
    scores, targets, _ = check_scores(scores, targets, num_dims=2)
    lowest = torch.where(targets, scores, torch.inf).amin(-1, keepdim=True)
    needed = (scores >= lowest).sum(-1) * targets.any(-1)
    return int(needed.sum()) / len(needed)


def calibration_error(probs: Array, targets: Array, num_bins: int = 15) -> float:
    """Expected calibration error over all N x C probabilities (Naeini et al. 2015): 0..1.

    The mean gap between the mean probability and the share of positives in `num_bins` bins of
    equal width, weighted by their counts.
    """
    scores, targets, _ = check_scores(probs, targets, num_dims=2)
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError(
            "probabilities must lie in 0..1, but got "
            f"{float(scores.min()):.4g}..{float(scores.max()):.4g}"
        )
    flat = scores.double().flatten()
    bins = (flat * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=flat.device)
    gaps.index_add_(0, bins, flat - targets.flatten().double())
    return float(gaps.abs().sum()) / len(flat)


def as_targets(targets: Array) -> Tensor:
    """Targets as bool `[N, C]`; ValueError for another shape or a value that is not 0 or 1."""
    tensor = _tensor(targets)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"targets [N, C] must not be empty, but got {tuple(tensor.shape)}")
    if tensor.dtype == torch.bool:
        return tensor
    wrong = (tensor != 0) & (tensor != 1)
    if bool(wrong.any()):
        raise ValueError(f"targets must be 0 or 1, but got {tensor[wrong][0].item()}")
    return tensor == 1


def check_scores(
    scores: Array, targets: Array, *, allow_nan: bool = False, num_dims: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Detached float scores, bool targets, and which leading entries hold NaN; or ValueError."""
    tensor = _tensor(scores)
    if tensor.dtype not in (torch.float32, torch.float64):
        # Exact for halves; integers need the wider type.
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
    targets = as_targets(targets)
    if tensor.shape[-2:] != targets.shape or num_dims not in (None, tensor.ndim):
        shape = "[..., N, C]" if num_dims is None else "[N, C]"
        raise ValueError(
            f"scores {shape} and targets [N, C] must agree, "
            f"but got {tuple(tensor.shape)} and {tuple(targets.shape)}"
        )
    if not bool(targets.any()):
        raise ValueError(f"targets hold no positive label: all {targets.numel()} are 0")
    diverged = tensor.amax((-2, -1)).isnan()  # A maximum with a NaN is NaN.
    if not allow_nan and bool(diverged.any()):
        raise ValueError(f"scores hold NaN: {int(tensor.isnan().sum())} of {tensor.numel()} values")
    return tensor, targets, diverged


def _tensor(values: Array | float) -> Tensor:
    # A copy of an array: `from_numpy` warns of read-only ones, such as pandas hands out.
    return values.detach() if isinstance(values, Tensor) else torch.tensor(values)


def _sorted(values: Tensor) -> Tensor:
    """Ascending along the last dimension. On a CPU by numpy, which sorts bare values;
    `torch.sort` carries indices along."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return torch.sort(values, dim=-1).values
