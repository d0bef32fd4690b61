"""RandAugment over a batch in which every picture has operations of its own.

The operations and their magnitudes are torchvision's, and so are the kernels, which take one
magnitude a call: the batch is sorted by operation and sign, and each kernel runs once a group.
B batch, C colours, s side of the square pictures, h, w height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

Draws = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

MAGNITUDES = 31
"""Steps of the magnitude, as torchvision counts them: 0 to 30."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of RandAugment over a batch of uint8 pictures [B, C, h, w]."""

    function: Callable[[Tensor, float], Tensor]
    """Pictures and the signed magnitude to pictures."""
    magnitude: Callable[[int, int], float] = lambda step, size: 0.0
    """Step (0 to 30) and side of the picture in pixels to the operation's own magnitude."""
    signed: bool = False
    """Whether the magnitude is negated with probability one half."""


def _up_to(most: float) -> Callable[[int, int], float]:
    return lambda step, size: float(torch.linspace(0, most, MAGNITUDES)[step])


def _shift(step: int, size: int) -> float:
    return int(_up_to(150 / 331 * size)(step, size))


def _affine(
    images: Tensor,
    *,
    x: int = 0,
    y: int = 0,
    shear: tuple[float, float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    degrees = [float(np.degrees(np.arctan(s))) for s in shear]
    result: Tensor = kernels.affine(
        images, angle=0.0, translate=[x, y], scale=1.0, shear=degrees, center=center
    )
    return result


OPERATIONS: dict[str, Operation] = {
    "Identity": Operation(function=lambda x, m: x),
    "ShearX": Operation(
        function=lambda x, m: _affine(x, shear=(m, 0.0), center=[0.0, 0.0]),
        magnitude=_up_to(0.3),
        signed=True,
    ),
    "ShearY": Operation(
        function=lambda x, m: _affine(x, shear=(0.0, m), center=[0.0, 0.0]),
        magnitude=_up_to(0.3),
        signed=True,
    ),
    "TranslateX": Operation(
        function=lambda x, m: _affine(x, x=int(m)), magnitude=_shift, signed=True
    ),
    "TranslateY": Operation(
        function=lambda x, m: _affine(x, y=int(m)), magnitude=_shift, signed=True
    ),
    "Rotate": Operation(function=kernels.rotate, magnitude=_up_to(30.0), signed=True),
    "Brightness": Operation(
        function=lambda x, m: kernels.adjust_brightness(x, 1 + m),
        magnitude=_up_to(0.9),
        signed=True,
    ),
    "Color": Operation(
        function=lambda x, m: kernels.adjust_saturation(x, 1 + m),
        magnitude=_up_to(0.9),
        signed=True,
    ),
    "Contrast": Operation(
        function=lambda x, m: kernels.adjust_contrast(x, 1 + m),
        magnitude=_up_to(0.9),
        signed=True,
    ),
    "Sharpness": Operation(
        function=lambda x, m: kernels.adjust_sharpness(x, 1 + m),
        magnitude=_up_to(0.9),
        signed=True,
    ),
    "Posterize": Operation(
        function=lambda x, m: kernels.posterize(x, int(m)),
        magnitude=lambda step, size: 8 - round(4 * step / (MAGNITUDES - 1)),
    ),
    "Solarize": Operation(
        function=lambda x, m: kernels.solarize(x, 255 * m),
        magnitude=lambda step, size: float(torch.linspace(1, 0, MAGNITUDES)[step]),
    ),
    "AutoContrast": Operation(function=lambda x, m: kernels.autocontrast(x)),
    "Equalize": Operation(function=lambda x, m: kernels.equalize(x)),
}
_NAMES = tuple(OPERATIONS)
_SIGNED = np.array([operation.signed for operation in OPERATIONS.values()])


def randaugment(images_BCss: Tensor, draws_BK: Draws, magnitude: int) -> Tensor:
    """RandAugment (Cubuk et al. 2020) of square uint8 pictures [B, 3, s, s].

    Args:
        draws_BK: uniform in 0..1; each operation of a picture takes two columns of its row.
        magnitude: step of the strength of every operation, 0 to 30.
    """
    # Channels last, whatever it was, so that gathering pictures keeps the memory format.
    images_BssC = images_BCss.permute(0, 2, 3, 1)
    now_B = np.arange(len(images_BssC))  # which picture stands at each place
    for column in range(0, draws_BK.shape[1], 2):
        operation_B, negative_B = choose(draws_BK[:, column : column + 2])
        group_B = (2 * operation_B + negative_B)[now_B]
        order_B = np.argsort(group_B, kind="stable")
        images_BssC, now_B, group_B = _take(images_BssC, order_B), now_B[order_B], group_B[order_B]
        groups, starts = np.unique(group_B, return_index=True)
        for group, start, end in zip(groups, starts, [*starts[1:], len(now_B)], strict=True):
            part_BCss = images_BssC[start:end].permute(0, 3, 1, 2)
            operation = OPERATIONS[_NAMES[group // 2]]
            signed = operation.magnitude(magnitude, part_BCss.shape[3]) * (-1) ** (group % 2)
            part_BCss.copy_(operation.function(part_BCss, signed))
    return _take(images_BssC, np.argsort(now_B)).permute(0, 3, 1, 2)


def choose(draws_B2: Draws) -> tuple[Whole, Whole]:
    """The operation's place in OPERATIONS, and 1 where its magnitude is negated (else 0)."""
    operation_B = (draws_B2[:, 0] * len(_NAMES)).astype(np.int64)
    return operation_B, (_SIGNED[operation_B] & (draws_B2[:, 1] < 0.5)).astype(np.int64)


def _take(images_BssC: Tensor, order_B: Whole) -> Tensor:
    return images_BssC.index_select(0, torch.from_numpy(order_B).to(images_BssC.device))
