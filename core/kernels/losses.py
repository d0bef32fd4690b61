"""The losses of `core.losses` with their gradients, for stacks of heads on a CPU.

A kernel goes through the logits [H, L] of heads that have one loss, head by head: L = B x C, the
classes of a picture side by side, so that a head is one long loop that vectorizes. It writes each
head's mean over the pictures [H], and its gradient by the logits; both equal the namesake's and
autograd's (tests/contracts/test_loss_kernels.py). Exponentials and logarithms are Cephes'
polynomials, which err by a few roundings. H heads, B pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .compiled import compiled

Floats = npt.NDArray[np.float32]
Means = npt.NDArray[np.float64]

ZERO = np.float32(0.0)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
SMALLEST = np.float32(1e-8)
"""As in `core.losses`."""
LOWEST = np.float32(-87.0)
HIGHEST = np.float32(88.0)
"""Beyond them exponentials leave float32's range: they count as them."""
PICTURES = 64
"""That are computed at a time: what they need stays in a core's cache, and float32 can sum it."""


@compiled
def _exp(x: np.float32) -> np.float32:
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    # 1.5 * 2**23: adding it leaves the nearest integer in the lowest bits.
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)
    whole = shifted - np.float32(12582912.0)
    r = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + ONE
    bits = np.int32(np.int32(np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23))
    return p * np.int32(bits).view(np.float32)


@compiled
def _log(x: np.float32) -> np.float32:
    """Of a normal positive number."""
    bits = np.float32(x).view(np.int32)
    # The exponent that leaves a mantissa between the root of one half and that of two.
    exponent = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - ONE
    p = np.float32(7.0376836292e-2)
    p = p * f + np.float32(-1.1514610310e-1)
    p = p * f + np.float32(1.1676998740e-1)
    p = p * f + np.float32(-1.2420140846e-1)
    p = p * f + np.float32(1.4249322787e-1)
    p = p * f + np.float32(-1.6668057665e-1)
    p = p * f + np.float32(2.0000714765e-1)
    p = p * f + np.float32(-2.4999993993e-1)
    p = p * f + np.float32(3.3333331174e-1)
    square = f * f
    return f + (p * f * square - HALF * square) + np.float32(exponent) * np.float32(0.6931471806)


@compiled
def _repeated(row_C: Floats) -> Floats:
    """A row once for each of PICTURES."""
    repeated = np.empty(PICTURES * row_C.size, np.float32)
    for start in range(0, repeated.size, row_C.size):
        part_C = repeated[start : start + row_C.size]
        for c in range(row_C.size):
            part_C[c] = row_C[c]
    return repeated


@compiled
def _sum(values: Floats) -> np.float32:
    """In eight strands, which do not wait for each other."""
    strands = np.zeros(8, np.float32)
    whole = values.size // 8 * 8
    for start in range(0, whole, 8):
        part = values[start : start + 8]
        for i in range(8):
            strands[i] += part[i]
    total = ZERO
    for strand in strands:
        total += strand
    for value in values[whole:]:
        total += value
    return total


@compiled
def bce(
    logits_HL: Floats,
    targets_L: Floats,
    weights_HC: Floats,
    smoothing_H: Floats,
    means_H: Means,
    slopes_HL: Floats,
) -> None:
    """See `core.losses.bce`."""
    num_heads, length = logits_HL.shape
    block = PICTURES * weights_HC.shape[1]
    scale = ONE / np.float32(length)
    losses_L = np.empty(block, np.float32)
    for h in range(num_heads):
        weights_L = _repeated(weights_HC[h])
        smoothing = smoothing_H[h]
        means_H[h] = 0.0
        for start in range(0, length, block):
            own = slice(start, start + block)
            x_L, target_L, slope_L = logits_HL[h, own], targets_L[own], slopes_HL[h, own]
            for i in range(x_L.size):
                x, target = x_L[i], target_L[i]
                smooth = target * (ONE - smoothing) + smoothing * HALF
                positive = smooth * weights_L[i]
                total = ONE - smooth + positive
                e = _exp(-abs(x))
                q = ONE + e
                prob = (ONE if x >= ZERO else e) / q
                softplus = _log(q) + (x if x > ZERO else ZERO)
                losses_L[i] = total * softplus - positive * x
                slope_L[i] = (total * prob - positive) * scale
            means_H[h] += _sum(losses_L[: x_L.size]) * scale


@compiled
def focal(
    logits_HL: Floats,
    targets_L: Floats,
    weights_HC: Floats,
    smoothing_H: Floats,
    gamma_H: Floats,
    means_H: Means,
    slopes_HL: Floats,
) -> None:
    """See `core.losses.focal`."""
    num_heads, length = logits_HL.shape
    block = PICTURES * weights_HC.shape[1]
    scale = ONE / np.float32(length)
    losses_L = np.empty(block, np.float32)
    for h in range(num_heads):
        weights_L = _repeated(weights_HC[h])
        smoothing, gamma = smoothing_H[h], gamma_H[h]
        means_H[h] = 0.0
        for start in range(0, length, block):
            own = slice(start, start + block)
            x_L, target_L, slope_L = logits_HL[h, own], targets_L[own], slopes_HL[h, own]
            for i in range(x_L.size):
                x, target = x_L[i], target_L[i]
                smooth = target * (ONE - smoothing) + smoothing * HALF
                positive = smooth * weights_L[i]
                total = ONE - smooth + positive
                e = _exp(-abs(x))
                q = ONE + e
                prob = (ONE if x >= ZERO else e) / q
                softplus = _log(q) + (x if x > ZERO else ZERO)
                negative = ONE - target
                # The logarithm of 1 - p_t, whose slope is 1 - t - p.
                factor = _exp(gamma * (negative * x - softplus))
                focused = (total * softplus - positive * x) * factor
                losses_L[i] = focused
                slope = (total * prob - positive) * factor + gamma * (negative - prob) * focused
                slope_L[i] = slope * scale
            means_H[h] += _sum(losses_L[: x_L.size]) * scale


@compiled
def asymmetric(
    logits_HL: Floats,
    targets_L: Floats,
    weights_HC: Floats,
    smoothing_H: Floats,
    gamma_positive_H: Floats,
    gamma_negative_H: Floats,
    clip_H: Floats,
    means_H: Means,
    slopes_HL: Floats,
) -> None:
    """See `core.losses.asymmetric`."""
    num_heads, length = logits_HL.shape
    block = PICTURES * weights_HC.shape[1]
    scale = ONE / np.float32(length)
    losses_L = np.empty(block, np.float32)
    for h in range(num_heads):
        weights_L = _repeated(weights_HC[h])
        smoothing, gamma_positive, gamma_negative, clip = (
            smoothing_H[h],
            gamma_positive_H[h],
            gamma_negative_H[h],
            clip_H[h],
        )
        means_H[h] = 0.0
        for start in range(0, length, block):
            own = slice(start, start + block)
            x_L, target_L, slope_L = logits_HL[h, own], targets_L[own], slopes_HL[h, own]
            for i in range(x_L.size):
                x, target = x_L[i], target_L[i]
                smooth = target * (ONE - smoothing) + smoothing * HALF
                positive, negative = smooth * weights_L[i], ONE - smooth
                e = _exp(-abs(x))
                q = ONE + e
                prob = (ONE if x >= ZERO else e) / q
                softplus = _log(q) + (x if x > ZERO else ZERO)
                # Not 1 - prob, of which little is left when the head is sure.
                rest = (e if x >= ZERO else ONE) / q
                shifted = rest + clip
                left = ONE if shifted > ONE else shifted
                # Slopes of the probability, of what clipping leaves of it, and of the logarithm.
                curve = prob * rest
                unclipped = ZERO if shifted > ONE else curve
                log_slope = ZERO if left < SMALLEST else unclipped
                left = SMALLEST if left < SMALLEST else left
                # The two log terms (without their minus), and their slopes.
                log_term = (x - softplus) * positive + negative * _log(left)
                slope = rest * positive - log_slope / left * negative
                # The focusing factor, and the slope of its logarithm.
                wrong = rest if target > HALF else prob - clip
                wrong_slope = -curve if target > HALF else unclipped
                wrong_slope = ZERO if wrong < SMALLEST else wrong_slope
                wrong = SMALLEST if wrong < SMALLEST else wrong
                gamma = gamma_positive if target > HALF else gamma_negative
                factor = -_exp(gamma * _log(wrong))
                focus = wrong_slope / wrong * gamma
                losses_L[i] = log_term * factor
                slope_L[i] = (slope + focus * log_term) * factor * scale
            means_H[h] += _sum(losses_L[: x_L.size]) * scale


@compiled
def cross_entropy(
    logits_HL: Floats,
    targets_L: Floats,
    weights_HC: Floats,
    smoothing_H: Floats,
    means_H: Means,
    slopes_HL: Floats,
) -> None:
    """See `core.losses.cross_entropy`."""
    num_heads, length = logits_HL.shape
    num_classes = weights_HC.shape[1]
    scale, even = np.float32(num_classes / length), ONE / np.float32(num_classes)
    for h in range(num_heads):
        x_L, slope_L, weight_C = logits_HL[h], slopes_HL[h], weights_HC[h]
        for start in range(0, length, num_classes):
            x_C, slope_C = x_L[start : start + num_classes], slope_L[start : start + num_classes]
            highest = x_C[0]
            for x in x_C:
                highest = x if x > highest else highest
            for c in range(num_classes):
                slope_C[c] = x_C[c] - highest
        for i in range(length):
            slope_L[i] = _exp(slope_L[i])
        smoothing = smoothing_H[h]
        means_H[h] = 0.0
        for start in range(0, length, num_classes):
            x_C, slope_C = x_L[start : start + num_classes], slope_L[start : start + num_classes]
            target_C = targets_L[start : start + num_classes]
            num_labels, total, highest = ZERO, ZERO, x_C[0]
            for c in range(num_classes):
                num_labels += target_C[c]
                total += slope_C[c]
                highest = x_C[c] if x_C[c] > highest else highest
            has_labels = ONE if num_labels > ZERO else ZERO
            each = (ONE - smoothing) / (num_labels if num_labels > ZERO else ONE)
            all_shares, shared = ZERO, ZERO
            for c in range(num_classes):
                share = (target_C[c] * each + smoothing * even) * weight_C[c] * has_labels
                all_shares += share
                shared += share * (x_C[c] - highest)
            means_H[h] += all_shares * _log(total) - shared
            factor = all_shares / total
            for c in range(num_classes):
                share = (target_C[c] * each + smoothing * even) * weight_C[c] * has_labels
                slope_C[c] = (slope_C[c] * factor - share) * scale
        means_H[h] *= scale


@dataclass(frozen=True, kw_only=True)
class LossKernel:
    """A loss' kernel and what it reads of each head but label smoothing and class weights."""

    function: Callable[..., None]
    """(logits_HL, targets_L, weights_HC, smoothing_H, *parameters, means_H, slopes_HL)"""
    parameters: tuple[str, ...] = ()


LOSS_KERNELS: Mapping[str, LossKernel] = {
    "bce": LossKernel(function=bce),
    "cross_entropy": LossKernel(function=cross_entropy),
    "focal": LossKernel(function=focal, parameters=("gamma",)),
    "asymmetric": LossKernel(
        function=asymmetric, parameters=("gamma_positive", "gamma_negative", "clip")
    ),
}
"""By name, as in `core.losses.LOSSES`."""
