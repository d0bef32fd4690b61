"""What stacked heads compute: layers with dropout, their gradients, csra's attention, masks.

Letters as in `core.probing.stack`: H heads, B batch, D features, P places of a map, K outputs of a
layer, C classes, F = H x K outputs of a layer of the whole stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads import attend

Drop = Callable[[Sequence[int]], Tensor]
"""Masks [H, B, K] of a shape [B, K], each head's own: 0, or one over the probability to stay."""


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What a layer read in the forward pass."""

    values: Tensor
    """[B, D] that all heads share, or [H, B, K] after dropout."""
    masks_HBK: Tensor | None


def layered_logits(
    layers: Sequence[tuple[Tensor, Tensor]],
    features_BD: Tensor,
    *,
    drop: Drop | None = None,
    inputs: list[LayerInput] | None = None,
) -> Tensor:
    """Logits [H, B, C] of heads of linear layers with ReLU between them, in the layers' type.

    Args:
        layers: weights [H, K, D] and biases [H, K] of each, first to last.
        features_BD: in the same type.
        drop: dropout before each layer, if any.
        inputs: gets what each layer read, for `write_gradients`.
    """
    x, y_HBK = features_BD, None
    for weight_HKD, bias_HK in layers:
        if y_HBK is not None:
            x = torch.relu(y_HBK)
        masks_HBK = None
        if drop is not None:
            masks_HBK = drop(x.shape[-2:]).to(x.dtype)
            x = x * masks_HBK
        if inputs is not None:
            inputs.append(LayerInput(values=x, masks_HBK=masks_HBK))
        if x.dim() == 2:  # One product for all heads.
            flat_BF = F.linear(x, weight_HKD.flatten(0, 1), bias_HK.flatten())
            y_HBK = flat_BF.view(len(x), *bias_HK.shape).transpose(0, 1)
        else:
            y_HBK = torch.baddbmm(bias_HK.unsqueeze(1), x, weight_HKD.transpose(1, 2))
    assert y_HBK is not None
    return y_HBK


def write_gradients(
    weights: Sequence[Tensor],
    inputs: Sequence[LayerInput],
    slopes_HBC: Tensor,
    gradients: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """The way back through `layered_logits`.

    Fresh memory for gradients would cost a page fault every 4 KiB: so they are written where they
    were the step before.

    Args:
        weights: of each layer [H, K, D].
        inputs: of each layer.
        slopes_HBC: the gradient by the logits, float32.
        gradients: where those of the weights (in the weights' type) and of the biases (float32)
            of each layer go.
    """
    slopes_HBK = slopes_HBC
    for place in reversed(range(len(weights))):
        layer, (weight_gradient, bias_gradient) = inputs[place], gradients[place]
        kind = layer.values.dtype
        torch.sum(slopes_HBK, 1, dtype=torch.float32, out=bias_gradient)
        if layer.values.dim() == 2:
            slopes_FB = layer.values.new_empty(*bias_gradient.shape, len(layer.values))
            slopes_FB.copy_(slopes_HBK.transpose(1, 2))
            torch.mm(slopes_FB.flatten(0, 1), layer.values, out=weight_gradient.flatten(0, 1))
        else:
            slopes_HBK = slopes_HBK.to(kind)
            torch.bmm(slopes_HBK.transpose(1, 2), layer.values, out=weight_gradient)
        if place > 0:
            slopes_HBK = torch.bmm(slopes_HBK, weights[place])
            if layer.masks_HBK is not None:
                slopes_HBK.mul_(layer.masks_HBK)
            # Where ReLU gave zero (or a mask made one of it), nothing comes through.
            slopes_HBK = torch.ops.aten.threshold_backward(slopes_HBK, layer.values, 0)


def csra_logits(
    layer: tuple[Tensor, Tensor], settings: Mapping[str, Tensor], features_BPD: Tensor
) -> Tensor:
    """Logits [H, B, C] (float32) of csra heads on maps."""
    weight_HCD, bias_HC = layer
    scores = F.linear(features_BPD.flatten(0, 1), weight_HCD.flatten(0, 1), bias_HC.flatten())
    scores_BPHC = scores.float().view(*features_BPD.shape[:2], *bias_HC.shape)
    temperature = settings["csra_temperature"].view(1, 1, -1, 1)
    attention = settings["csra_lambda"].view(1, -1, 1)
    logits_BHC = scores_BPHC.mean(1) + attention * attend(scores_BPHC, temperature, dim=1)
    return logits_BHC.transpose(0, 1)


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
