"""The losses of `core.losses` with their gradients in closed form, for stacks of heads.

A step of few heads is short: to record a loss' twenty small operations, and to go back through
them, would cost more than the heads' products. Every function takes what its namesake takes and
returns the loss of each picture [...] and its gradient by the logits [..., C]; both equal the
namesake's and autograd's (tests/contracts/test_loss_gradients.py). C: classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import SMALLEST, Parameter, label_shares, smooth

LossWithGradient = Callable[..., tuple[Tensor, Tensor]]
"""(logits_xC, targets_xC, *, label_smoothing, class_weights_C, **parameters) ->
(loss_x, gradient_xC)"""


def bce(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `core.losses.bce`."""
    softplus_xC, prob_xC = F.softplus(logits_xC), torch.sigmoid(logits_xC)
    loss_xC, slope_xC = _bce_terms(
        logits_xC, softplus_xC, prob_xC, smooth(targets_xC, label_smoothing, 2), class_weights_C
    )
    return loss_xC.mean(-1), slope_xC.div_(logits_xC.shape[-1])


def cross_entropy(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `core.losses.cross_entropy`."""
    shares_xC = label_shares(targets_xC, label_smoothing, class_weights_C)
    log_prob_xC = F.log_softmax(logits_xC, dim=-1)
    loss_x = (shares_xC * log_prob_xC).sum(-1).neg_()
    # In place of the logarithms, which are not read again.
    gradient_xC = log_prob_xC.exp_().mul_(shares_xC.sum(-1, keepdim=True)).sub_(shares_xC)
    return loss_x, gradient_xC


def focal(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    gamma: Parameter = 2.0,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `core.losses.focal`."""
    softplus_xC, prob_xC = F.softplus(logits_xC), torch.sigmoid(logits_xC)
    loss_xC, slope_xC = _bce_terms(
        logits_xC, softplus_xC, prob_xC, smooth(targets_xC, label_smoothing, 2), class_weights_C
    )
    negatives_xC = 1 - targets_xC
    # The logarithm of 1 - p_t, whose slope is 1 - t - p.
    log_wrong_xC = (negatives_xC * logits_xC).sub_(softplus_xC)
    factor_xC = log_wrong_xC.mul_(gamma).exp_()
    focused_xC = loss_xC * factor_xC
    slope_xC.mul_(factor_xC).add_((negatives_xC - prob_xC).mul_(focused_xC).mul_(gamma))
    return focused_xC.mean(-1), slope_xC.div_(logits_xC.shape[-1])


def asymmetric(
    logits_xC: Tensor,
    targets_xC: Tensor,
    *,
    gamma_positive: Parameter = 1.0,
    gamma_negative: Parameter = 4.0,
    clip: Parameter = 0.05,
    label_smoothing: Parameter = 0.0,
    class_weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `core.losses.asymmetric`."""
    positive_xC = targets_xC > 0.5
    softplus_xC, prob_xC = F.softplus(logits_xC), torch.sigmoid(logits_xC)
    rest_xC = 1 - prob_xC
    shifted_xC = rest_xC + clip
    prob_negative_xC = shifted_xC.clamp(SMALLEST, 1.0)
    # Slopes of the probability, and of what clipping leaves of it.
    curve_xC = prob_xC * rest_xC
    unclipped_xC = curve_xC * (shifted_xC <= 1)
    positive_share_xC = smooth(targets_xC, label_smoothing, 2)
    negative_share_xC = 1 - positive_share_xC
    if class_weights_C is not None:
        positive_share_xC = positive_share_xC * class_weights_C
    # The two log terms (without their minus), and their slopes.
    log_term_xC = (logits_xC - softplus_xC).mul_(positive_share_xC)
    log_term_xC.addcmul_(negative_share_xC, prob_negative_xC.log())
    slope_xC = (rest_xC * positive_share_xC).sub_(
        (unclipped_xC / prob_negative_xC).mul_(negative_share_xC)
    )
    # The focusing factor, and the slope of its logarithm.
    wrong_xC = torch.where(positive_xC, rest_xC, 1 - prob_negative_xC).clamp_(min=SMALLEST)
    gamma_xC = torch.where(
        positive_xC, torch.as_tensor(gamma_positive), torch.as_tensor(gamma_negative)
    ).to(wrong_xC)
    factor_xC = (wrong_xC**gamma_xC).neg_()
    focus_xC = torch.where(positive_xC, curve_xC.neg_(), unclipped_xC).div_(wrong_xC).mul_(gamma_xC)
    slope_xC.addcmul_(focus_xC, log_term_xC).mul_(factor_xC)
    return log_term_xC.mul_(factor_xC).mean(-1), slope_xC.div_(logits_xC.shape[-1])


def _bce_terms(
    logits_xC: Tensor,
    softplus_xC: Tensor,
    prob_xC: Tensor,
    smooth_xC: Tensor,
    class_weights_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The cross entropy of each class, and its slope."""
    if class_weights_C is None:
        return softplus_xC - smooth_xC * logits_xC, prob_xC - smooth_xC
    weighted_xC = smooth_xC * class_weights_C
    total_xC = 1 - smooth_xC + weighted_xC
    loss_xC = (total_xC * softplus_xC).sub_(weighted_xC * logits_xC)
    return loss_xC, total_xC.mul_(prob_xC).sub_(weighted_xC)


LOSSES_WITH_GRADIENTS: dict[str, LossWithGradient] = {
    "bce": bce,
    "cross_entropy": cross_entropy,
    "focal": focal,
    "asymmetric": asymmetric,
}
"""By name, as in `core.losses.LOSSES`."""
