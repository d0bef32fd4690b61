"""The forward pass of stacked heads: what their layers and dropout compute, and with which memory.

Letters as in `core.probing.stack`: H heads, B batch, D features, P places of a map, K outputs of a
layer, C classes, F = H x K outputs of the whole stack's first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads import attend

Drop = Callable[[Tensor], Tensor]


class _SharedProduct(torch.autograd.Function):
    """The first layer of all heads, which read the same features, as one product [B, H * K].

    The gradient of the weights is written where it was the step before (`gradient_HKD`): fresh
    memory for it costs a page fault every 4 KiB.
    """

    @staticmethod
    def forward(
        ctx: Any, features_BD: Tensor, weight_HKD: Tensor, bias_HK: Tensor, gradient_HKD: Tensor
    ) -> Tensor:
        ctx.save_for_backward(features_BD)
        ctx.gradient = gradient_HKD
        kind = features_BD.dtype
        return F.linear(features_BD, weight_HKD.flatten(0, 1).to(kind), bias_HK.flatten().to(kind))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BF,) = grads
        (features_BD,) = ctx.saved_tensors
        write_product(grad_BF.t(), features_BD, ctx.gradient.flatten(0, 1))
        bias_grad_HK = grad_BF.sum(0, dtype=torch.float32).view(ctx.gradient.shape[:2])
        return None, ctx.gradient, bias_grad_HK, None


def _shared_product(
    features_BD: Tensor, weight_HKD: Tensor, bias_HK: Tensor, gradient: Tensor | None
) -> Tensor:
    if gradient is None:
        return F.linear(features_BD, weight_HKD.flatten(0, 1), bias_HK.flatten())
    if torch.is_autocast_enabled(features_BD.device.type):
        features_BD = features_BD.to(torch.get_autocast_dtype(features_BD.device.type))
    product: Tensor = _SharedProduct.apply(features_BD, weight_HKD, bias_HK, gradient)
    return product


def linear_logits(weight_HKD: Tensor, bias_HK: Tensor, features_BD: Tensor) -> Tensor:
    """Logits [B, H, C] (float32) of heads of one layer; the product is in the features' type."""
    kind = features_BD.dtype
    flat_BF = F.linear(features_BD, weight_HKD.flatten(0, 1).to(kind), bias_HK.flatten().to(kind))
    return flat_BF.float().view(len(features_BD), *bias_HK.shape)


def linear_gradients(
    slopes_BHC: Tensor, features_BD: Tensor, gradient_HKD: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, which are written to `gradient_HKD`, and of the biases of heads of
    one layer, from those of their logits; the product is in the features' type."""
    slopes_BF = slopes_BHC.flatten(1).to(features_BD.dtype)
    write_product(slopes_BF.t(), features_BD, gradient_HKD.flatten(0, 1))
    return gradient_HKD, slopes_BHC.sum(0)


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out` = left @ right, computed in the type that these have."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def layered_logits(
    layers: Sequence[tuple[Tensor, Tensor]],
    features_BD: Tensor,
    drop: Drop | None,
    gradient: Tensor | None,
) -> Tensor:
    """Logits [B, H, C] of heads of linear layers with ReLU between them.

    Args:
        layers: weights [H, K, D] and biases [H, K] of each, first to last.
        drop: dropout before each layer, if any: see `HeadStack._drop`.
        gradient: where the gradient of the first weights is to be written, [H, K, D]; None where
            none is wanted, or to let autograd find the memory.
    """
    x_HBK: Tensor | None = None
    for weight_HKD, bias_HK in layers:
        if x_HBK is not None:
            x_HBK = torch.relu(x_HBK)
        if drop is not None:
            x_HBK = drop(features_BD if x_HBK is None else x_HBK)
        if x_HBK is None:
            flat = _shared_product(features_BD, weight_HKD, bias_HK, gradient)
            x_HBK = flat.view(len(features_BD), len(bias_HK), -1).transpose(0, 1)
        else:
            # Weights on the left: their gradient comes out in their own memory order, and the
            # update need not stride through it.
            x_HKB = torch.baddbmm(bias_HK.unsqueeze(2), weight_HKD, x_HBK.transpose(1, 2))
            x_HBK = x_HKB.transpose(1, 2)
    assert x_HBK is not None
    return x_HBK.transpose(0, 1)


def csra_logits(
    layer: tuple[Tensor, Tensor],
    settings: Mapping[str, Tensor],
    features_BPD: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """Logits [B, H, C] of csra heads on maps; `gradient` as for `layered_logits`."""
    weight_HCD, bias_HC = layer
    scores = _shared_product(features_BPD.flatten(0, 1), weight_HCD, bias_HC, gradient)
    scores_BPHC = scores.float().view(*features_BPD.shape[:2], *bias_HC.shape)
    temperature = settings["csra_temperature"].view(1, 1, -1, 1)
    attention = settings["csra_lambda"].view(1, -1, 1)
    return scores_BPHC.mean(1) + attention * attend(scores_BPHC, temperature, dim=1)


class Masks:
    """A head's stream of masks, which goes on where it was when it is pickled and loaded."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._stream: np.random.Generator | torch.Generator
        if device.type == "cpu":
            self._stream = np.random.Generator(np.random.SFC64(seed))
        else:
            self._stream = torch.Generator(device).manual_seed(seed)

    def __call__(self, shape: Sequence[int], keep: float) -> Tensor:
        """A mask that is true with a probability, on a CPU in steps of 2**-16: numpy draws 16 bits
        a time."""
        if isinstance(self._stream, torch.Generator):
            return torch.rand(*shape, generator=self._stream, device=self._device) < keep
        numbers = self._stream.integers(0, 1 << 16, size=tuple(shape), dtype=np.uint16)
        return torch.from_numpy(numbers < round(keep * (1 << 16)))
