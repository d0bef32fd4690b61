"""The optimizers' updates of stacked weights on a CPU, in one pass over them.

Every kernel changes weights [H, K] (float32) and the optimizer's slots of that shape in place, with
one value of every setting a head [H] (float64). Where products are computed in bfloat16, gradients
come in it, and the weights' copy in it is kept up to date; both are passed as the bits of their
numbers, with no column where they are not wanted. The contract is `torch.optim`
(tests/contracts/test_stack.py). H heads, K weights of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .compiled import compiled

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16]
Values = npt.NDArray[np.float64]

EPS = np.float32(1e-8)
"""As in `core.optimizers`."""
ONE = np.float32(1.0)
BLOCK = 4096
"""Weights of a head that are updated at a time: what a block needs stays in a core's cache."""


@compiled
def _widened(grad_K: Floats, narrow_grad_K: Bits, place_K: Floats) -> Floats:
    """A block's gradient as float32; `place_K` is where to put it if it is not."""
    if narrow_grad_K.size == 0:
        return grad_K
    for k in range(narrow_grad_K.size):
        bits = np.uint32(np.uint32(narrow_grad_K[k]) << np.uint32(16))
        place_K[k] = np.uint32(bits).view(np.float32)
    return place_K[: narrow_grad_K.size]


@compiled
def _copy_narrow(w_K: Floats, copy_K: Bits) -> None:
    """Round a block to the nearest bfloat16, halves to even ones."""
    for k in range(copy_K.size):
        bits = np.float32(w_K[k]).view(np.uint32)
        even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(bits + np.uint32(even + np.uint32(0x7FFF)))
        # NaN, whose bits could be rounded to another number's.
        rounded = rounded if w_K[k] == w_K[k] else np.uint32(0x7FC00000)
        copy_K[k] = np.uint16(rounded >> np.uint32(16))


@compiled
def sgd(
    weights_HK: Floats,
    grad_HK: Floats,
    narrow_grad_HK: Bits,
    copy_HK: Bits,
    slots: tuple[Floats, ...],
    decay_H: Values,
    momentum_H: Values,
    nesterov_H: Values,
    lr_H: Values,
    step: int,
) -> None:
    """Torch's SGD, whose buffer's first value is the gradient: the buffer starts at zero."""
    wide_K = np.empty(BLOCK, np.float32)
    num_heads, num_weights = weights_HK.shape
    for h in range(num_heads):
        decay, momentum = np.float32(decay_H[h]), np.float32(momentum_H[h])
        # Torch's step is lr * buffer, or lr * (grad + momentum * buffer) with Nesterov's momentum.
        by_buffer = np.float32(lr_H[h] * (momentum_H[h] if nesterov_H[h] > 0 else 1.0))
        by_gradient = np.float32(lr_H[h] * nesterov_H[h])
        for start in range(0, num_weights, BLOCK):
            block = slice(start, start + BLOCK)
            w_K, buffer_K = weights_HK[h, block], slots[0][h, block]
            grad_K = _widened(grad_HK[h, block], narrow_grad_HK[h, block], wide_K)
            for k in range(grad_K.size):
                g = grad_K[k] + decay * w_K[k]
                kept = momentum * buffer_K[k] + g
                buffer_K[k] = kept
                w_K[k] -= by_buffer * kept + by_gradient * g
            _copy_narrow(w_K, copy_HK[h, block])


@compiled
def _adam(
    weights_HK: Floats,
    grad_HK: Floats,
    narrow_grad_HK: Bits,
    copy_HK: Bits,
    slots: tuple[Floats, ...],
    decay_H: Values,
    beta1_H: Values,
    beta2_H: Values,
    lr_H: Values,
    step: int,
    decoupled: bool,
) -> None:
    wide_K = np.empty(BLOCK, np.float32)
    num_heads, num_weights = weights_HK.shape
    for h in range(num_heads):
        decay = np.float32(0.0 if decoupled else decay_H[h])
        shrink = np.float32(1.0 - lr_H[h] * decay_H[h] if decoupled else 1.0)
        beta2, new1 = np.float32(beta2_H[h]), np.float32(1.0 - beta1_H[h])
        new2 = np.float32(1.0 - beta2_H[h])
        rate = np.float32(lr_H[h] / (1.0 - beta1_H[h] ** step))
        corrected = np.float32(1.0 / np.sqrt(1.0 - beta2_H[h] ** step))
        for start in range(0, num_weights, BLOCK):
            block = slice(start, start + BLOCK)
            w_K, first_K, second_K = weights_HK[h, block], slots[0][h, block], slots[1][h, block]
            grad_K = _widened(grad_HK[h, block], narrow_grad_HK[h, block], wide_K)
            for k in range(grad_K.size):
                g = grad_K[k] + decay * w_K[k]
                m = first_K[k]
                m += (g - m) * new1
                v = beta2 * second_K[k] + new2 * g * g
                first_K[k], second_K[k] = m, v
                w_K[k] = w_K[k] * shrink - rate * m / (np.sqrt(v) * corrected + EPS)
            _copy_narrow(w_K, copy_HK[h, block])


@compiled
def adam(
    weights_HK: Floats,
    grad_HK: Floats,
    narrow_grad_HK: Bits,
    copy_HK: Bits,
    slots: tuple[Floats, ...],
    decay_H: Values,
    beta1_H: Values,
    beta2_H: Values,
    lr_H: Values,
    step: int,
) -> None:
    """Torch's Adam: weight decay is a part of the gradient."""
    _adam(
        weights_HK, grad_HK, narrow_grad_HK, copy_HK, slots, decay_H, beta1_H, beta2_H, lr_H, step,
        False,
    )  # fmt: skip


@compiled
def adamw(
    weights_HK: Floats,
    grad_HK: Floats,
    narrow_grad_HK: Bits,
    copy_HK: Bits,
    slots: tuple[Floats, ...],
    decay_H: Values,
    beta1_H: Values,
    beta2_H: Values,
    lr_H: Values,
    step: int,
) -> None:
    """Torch's AdamW: weights decay by themselves."""
    _adam(
        weights_HK, grad_HK, narrow_grad_HK, copy_HK, slots, decay_H, beta1_H, beta2_H, lr_H, step,
        True,
    )  # fmt: skip


@compiled
def rmsprop(
    weights_HK: Floats,
    grad_HK: Floats,
    narrow_grad_HK: Bits,
    copy_HK: Bits,
    slots: tuple[Floats, ...],
    decay_H: Values,
    alpha_H: Values,
    lr_H: Values,
    step: int,
) -> None:
    """Torch's RMSprop without momentum."""
    wide_K = np.empty(BLOCK, np.float32)
    num_heads, num_weights = weights_HK.shape
    for h in range(num_heads):
        decay, rate = np.float32(decay_H[h]), np.float32(lr_H[h])
        alpha, new = np.float32(alpha_H[h]), np.float32(1.0 - alpha_H[h])
        for start in range(0, num_weights, BLOCK):
            block = slice(start, start + BLOCK)
            w_K, square_K = weights_HK[h, block], slots[0][h, block]
            grad_K = _widened(grad_HK[h, block], narrow_grad_HK[h, block], wide_K)
            for k in range(grad_K.size):
                g = grad_K[k] + decay * w_K[k]
                v = alpha * square_K[k] + new * g * g
                square_K[k] = v
                w_K[k] -= rate * g / (np.sqrt(v) + EPS)
            _copy_narrow(w_K, copy_HK[h, block])


@dataclass(frozen=True, kw_only=True)
class UpdateKernel:
    """An optimizer's kernel and what it reads of each head but rate and weight decay."""

    function: Callable[..., None]
    """(weights_HK, grad_HK, narrow_grad_HK, copy_HK, slots, decay_H, *parameters, lr_H,
    step)"""
    num_slots: int
    parameters: tuple[str, ...] = ()


UPDATE_KERNELS: Mapping[str, UpdateKernel] = {
    "sgd": UpdateKernel(function=sgd, num_slots=1, parameters=("momentum", "nesterov")),
    "adam": UpdateKernel(function=adam, num_slots=2, parameters=("beta1", "beta2")),
    "adamw": UpdateKernel(function=adamw, num_slots=2, parameters=("beta1", "beta2")),
    "rmsprop": UpdateKernel(function=rmsprop, num_slots=1, parameters=("alpha",)),
}
"""By name, as in `core.optimizers.OPTIMIZERS`."""
