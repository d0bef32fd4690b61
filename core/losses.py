"""Losses for multi-label targets, written once for one head and for many.

Every loss maps logits [..., C] and 0/1 targets broadcastable to it onto one number a picture
[...]; its parameters are numbers or tensors broadcastable to [..., C]. A head alone passes
numbers, a stack of heads passes one value a head. The caller takes the mean over pictures.
The bce family is the mean over classes (not the sum of some papers), so that one learning rate
means the same for all of them. C: classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Parameter = float | Tensor
SMALLEST = 1e-8
"""Probabilities below it count as it where a logarithm or a power is taken of them."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss and the settings that it reads."""

    function: Callable[..., Tensor]
    """(logits_xC, targets_xC, *, label_smoothing, class_weights_C, **parameters) -> loss_x"""
    parameters: tuple[str, ...] = ()
    """Fields of `TrialConfig` it reads besides label_smoothing and class_weights."""


def bce(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy of the sigmoid of each logit.

    Smoothing moves targets towards one half: t (1 - s) + s / 2. A class weight multiplies the
    positive term of its class, as `pos_weight` of torch's BCEWithLogitsLoss.
    """
    targets_xC = smooth(targets_xC, label_smoothing, 2).expand_as(logits_xC)
    return F.binary_cross_entropy_with_logits(
        logits_xC, targets_xC, pos_weight=class_weights_C, reduction="none"
    ).mean(-1)


def cross_entropy(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Softmax cross entropy against the labels of a picture sharing its probability evenly.

    (Mahajan et al. 2018, section 2.3.) A picture without labels costs nothing. Smoothing and
    class weights as in torch.nn.functional.cross_entropy with class probabilities.
    """
    shares_xC = label_shares(targets_xC, label_smoothing, class_weights_C)
    return -(shares_xC * F.log_softmax(logits_xC, dim=-1)).sum(-1)


def focal(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    gamma: Parameter = 2.0,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Focal loss (Lin et al. 2017) without its alpha, whose place class weights take.

    The factor (1 - p_t) ** gamma uses the unsmoothed target; gamma 0 is bce.
    """
    smooth_xC = smooth(targets_xC, label_smoothing, 2).expand_as(logits_xC)
    loss_xC = F.binary_cross_entropy_with_logits(
        logits_xC, smooth_xC, pos_weight=class_weights_C, reduction="none"
    )
    # log(1 - p_t) is the log-sigmoid of the logit with its sign turned for positives: exact where
    # 1 - p_t underflows, and its gradient stays finite for gamma < 1.
    log_wrong_xC = F.logsigmoid(torch.where(targets_xC > 0.5, -logits_xC, logits_xC))
    return (torch.exp(gamma * log_wrong_xC) * loss_xC).mean(-1)


def asymmetric(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    gamma_positive: Parameter = 1.0,
    gamma_negative: Parameter = 4.0,
    clip: Parameter = 0.05,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Asymmetric loss (Ridnik et al. 2021): negatives are focused harder than positives, and
    negatives below the probability `clip` cost nothing. The focusing factors carry gradient, as
    in the authors' default. Smoothing acts on the two log terms.
    """
    positive_xC = targets_xC > 0.5
    smooth_xC = smooth(targets_xC, label_smoothing, 2)
    prob_xC = torch.sigmoid(logits_xC)
    prob_negative_xC = (1 - prob_xC + clip).clamp(max=1.0)
    log_positive_xC = F.logsigmoid(logits_xC)
    log_negative_xC = torch.log(prob_negative_xC.clamp(min=SMALLEST))
    weight = 1.0 if class_weights_C is None else class_weights_C
    loss_xC = -(smooth_xC * weight * log_positive_xC + (1 - smooth_xC) * log_negative_xC)
    wrong_xC = torch.where(positive_xC, 1 - prob_xC, 1 - prob_negative_xC)
    gamma_xC = torch.where(
        positive_xC, torch.as_tensor(gamma_positive), torch.as_tensor(gamma_negative)
    ).to(wrong_xC)
    # The clamp keeps the gradient of 0 ** gamma finite for gamma < 1.
    return (wrong_xC.clamp(min=SMALLEST) ** gamma_xC * loss_xC).mean(-1)


LOSSES: dict[str, Loss] = {
    "bce": Loss(function=bce),
    "cross_entropy": Loss(function=cross_entropy),
    "focal": Loss(function=focal, parameters=("gamma",)),
    "asymmetric": Loss(
        function=asymmetric, parameters=("gamma_positive", "gamma_negative", "clip")
    ),
}


def class_weights(kind: str, targets_NC: Tensor) -> Tensor | None:
    """Weights [C] of the classes' positive labels, mean 1, or None for `none`.

    `inverse`: by one over the number of positives; `sqrt_inverse`: by the root of it. A class
    without positives counts as having one.
    """
    if kind == "none":
        return None
    counts_C = targets_NC.sum(0, dtype=torch.float64).clamp(min=1)
    weights_C = {"inverse": 1 / counts_C, "sqrt_inverse": counts_C.rsqrt()}[kind]
    return (weights_C / weights_C.mean()).float()


def label_shares(
    targets_xC: Tensor, label_smoothing: Parameter, class_weights_C: Tensor | None
) -> Tensor:
    """Each label's share of its picture, smoothed and weighted, as `cross_entropy` reads it; all 0
    for a picture without labels."""
    num_labels_x1 = targets_xC.sum(-1, keepdim=True)
    shares_xC = targets_xC / num_labels_x1.clamp(min=1)
    shares_xC = smooth(shares_xC, label_smoothing, targets_xC.shape[-1])
    if class_weights_C is not None:
        shares_xC = shares_xC * class_weights_C
    return torch.where(num_labels_x1 > 0, shares_xC, 0.0)


def smooth(targets_xC: Tensor, amount: Parameter, num_outcomes: int) -> Tensor:
    """Targets moved by an amount towards all of so many outcomes being alike."""
    if isinstance(amount, (int, float)) and amount == 0:
        return targets_xC
    return targets_xC * (1 - amount) + amount / num_outcomes
