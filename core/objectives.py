"""What validation can say of a model: the objectives that a trial can have, and more at its end.

N pictures, H models, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .metrics import (
    f1,
    macro_recall,
    mean_average_precision,
    topk_recall,
    worst_class_recall,
)

METRICS: dict[str, Callable[..., Tensor]] = {
    "top3_accuracy": topk_recall,
    "mean_average_precision": mean_average_precision,
}
"""Objectives: (scores [H, N, C], targets [N, C], allow_nan) -> [H]; higher is better."""


def further_metrics(logits_NC: Tensor, targets_NC: Tensor) -> dict[str, float]:
    """Validation metrics that are worth computing once a trial, at its best epoch. The worst class'
    recall is left out where no class has enough pictures to be judged by."""
    worst = worst_class_recall(logits_NC, targets_NC)
    return {
        **({} if worst is None else {"validation_worst_class_recall": worst}),
        "validation_mean_average_precision": float(mean_average_precision(logits_NC, targets_NC)),
        "validation_macro_recall": float(macro_recall(logits_NC, targets_NC)),
        "validation_micro_f1": f1(torch.sigmoid(logits_NC), targets_NC),
    }
