"""Training pictures seen a little differently every epoch, in batches on the device.

A picture's randomness comes from its own seed alone: it looks the same whatever batch and rank it
is in. Mixing (mixup, cutmix) needs a partner, so that is drawn for the batch. Kernels are those of
torchvision's v2 transforms. B batch, K draws a picture, A attempts at a crop, C colours, s side of
the square pictures, h, w height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from .randaugment import MAGNITUDES, randaugment

Seeds = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
Draws = npt.NDArray[np.float64]
Boxes = npt.NDArray[np.int64]

_CROP_ATTEMPTS = 10
_LOG_RATIOS = (np.log(3 / 4), np.log(4 / 3))
# Columns of a picture's draws: a setting that is off leaves the others' draws as they are.
_FLIP = 0
_CROP = 1
_RANDAUGMENT = _CROP + 2 * _CROP_ATTEMPTS + 2


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training pictures. Crop, then flip, then RandAugment, as torchvision's own
    training script does it; every part is off by default."""

    horizontal_flip: bool = False
    """Mirror a picture with probability one half."""
    min_crop_scale: float = 1.0
    """Least share of the area that a random crop keeps, 0 < s <= 1; 1 is no crop. Sides relate
    as 3/4 to 4/3, and the crop is brought back to the picture's size."""
    randaugment_magnitude: int = 0
    """Strength of RandAugment's operations, 1 to 30; 0 is no RandAugment."""
    randaugment_ops: int = 2
    """Operations applied to a picture one after the other, >= 1."""

    def __post_init__(self) -> None:
        assert 0 < self.min_crop_scale <= 1
        assert 0 <= self.randaugment_magnitude < MAGNITUDES
        assert self.randaugment_ops >= 1

    def __call__(self, images_BCss: Tensor, seeds_B: Seeds) -> Tensor:
        """Square uint8 pictures [B, 3, s, s] to as many of the same size and memory format.

        `seeds_B` (see `picture_seeds`) alone decides what happens to each. The input is not
        changed.
        """
        assert images_BCss.dtype == torch.uint8 and images_BCss.shape[2] == images_BCss.shape[3]
        num_draws = _RANDAUGMENT + 2 * self.randaugment_ops
        draws_BK = _draws(seeds_B, num_draws)
        images = images_BCss
        if self.min_crop_scale < 1:
            images = _crop(
                images, crop_boxes(draws_BK[:, _CROP:], images.shape[3], self.min_crop_scale)
            )
        if self.horizontal_flip:
            flipped = torch.from_numpy(draws_BK[:, _FLIP] < 0.5).to(images.device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if self.randaugment_magnitude:
            images = randaugment(images, draws_BK[:, _RANDAUGMENT:], self.randaugment_magnitude)
        return images


def crop_boxes(draws_BK: Draws, size: int, min_scale: float) -> Boxes:
    """Top, left, height, width [B, 4] of each random crop of pictures with sides `size`, in pixels.

    The draws are torchvision's RandomResizedCrop (after Szegedy et al. 2015): ten attempts at an
    area and a ratio of sides, the first that fits in the picture, else the whole picture.
    """
    attempts = 2 * _CROP_ATTEMPTS
    area_BA, ratio_BA = draws_BK[:, 0:attempts:2], draws_BK[:, 1:attempts:2]
    area_BA = size**2 * (min_scale + (1 - min_scale) * area_BA)
    ratio_BA = np.exp(_LOG_RATIOS[0] + (_LOG_RATIOS[1] - _LOG_RATIOS[0]) * ratio_BA)
    width_BA = np.rint(np.sqrt(area_BA * ratio_BA))
    height_BA = np.rint(np.sqrt(area_BA / ratio_BA))
    fits_BA = (width_BA > 0) & (width_BA <= size) & (height_BA > 0) & (height_BA <= size)
    first_B = fits_BA.argmax(1)[:, None]
    fits_B = fits_BA.any(1)
    width_B = np.where(fits_B, np.take_along_axis(width_BA, first_B, 1)[:, 0], size)
    height_B = np.where(fits_B, np.take_along_axis(height_BA, first_B, 1)[:, 0], size)
    top_B = np.floor(draws_BK[:, attempts] * (size - height_B + 1))
    left_B = np.floor(draws_BK[:, attempts + 1] * (size - width_B + 1))
    return np.stack([top_B, left_B, height_B, width_B], 1).astype(np.int64)


def _crop(images_BCss: Tensor, boxes_B4: Boxes) -> Tensor:
    """Each picture's box, enlarged to the picture's size, bilinear.

    A box is never larger than the picture, so nothing is made smaller and no antialiasing is due.
    """
    if images_BCss.device.type == "cpu":
        # Its kernel for uint8 takes a quarter of the time of `enlarge_boxes` at 224 pixels.
        size = list(images_BCss.shape[2:])
        cropped = torch.empty_like(images_BCss)
        for image, box, out in zip(images_BCss, boxes_B4.tolist(), cropped, strict=True):
            out.copy_(kernels.resized_crop(image, *box, size=size, antialias=False))
        return cropped
    return enlarge_boxes(images_BCss, boxes_B4)


def enlarge_boxes(images_BCss: Tensor, boxes_B4: Boxes) -> Tensor:
    """As `_crop`, for all pictures in one kernel: on a GPU, one a picture costs more to start than
    to run. Equals torchvision's kernel but for rounding."""
    size, device = images_BCss.shape[3], images_BCss.device
    boxes_4B = torch.from_numpy(boxes_B4.T.astype(np.float32)).to(device)
    top_B1, left_B1, height_B1, width_B1 = boxes_4B[:, :, None]
    middle_s = torch.arange(size, device=device) + 0.5

    def places(start_B1: Tensor, length_B1: Tensor) -> Tensor:
        pixels_Bs = (middle_s * length_B1 / size - 0.5).clamp_min(0)
        pixels_Bs = start_B1 + torch.minimum(pixels_Bs, length_B1 - 1)
        return (2 * pixels_Bs + 1) / size - 1  # grid_sample counts from -1 to 1 over the edges

    x_Bs, y_Bs = places(left_B1, width_B1), places(top_B1, height_B1)
    grid_Bss2 = torch.stack(
        [x_Bs[:, None].expand(-1, size, -1), y_Bs[:, :, None].expand(-1, -1, size)], 3
    )
    sampled = F.grid_sample(
        images_BCss.float(), grid_Bss2, padding_mode="border", align_corners=False
    )
    return torch.empty_like(images_BCss).copy_(sampled.round_())


def picture_seeds(seed: int, epoch: int, rows_B: npt.NDArray[np.int64]) -> Seeds:
    """One seed a picture [B], of the trial's seed, the epoch and the picture's row in the table."""
    words = _mixed(np.array([seed], np.uint64))  # an array: it wraps around without a warning
    words = _mixed(words + np.array([epoch], np.uint64))
    return _mixed(words + rows_B.astype(np.uint64)).view(np.int64)


def _draws(seeds_B: Seeds, num_draws: int) -> Draws:
    """Uniform numbers in [0, 1), [B, K]: row b depends on seed b only.

    SplitMix64 (Steele et al. 2014) as a counter, since numpy's generators take as long to seed
    (some 20 microseconds a picture) as a small picture takes to augment.
    """
    steps_K = np.arange(1, num_draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words_BK = _mixed(seeds_B.view(np.uint64)[:, None] + steps_K)
    return (words_BK >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: _Words) -> _Words:
    """SplitMix64's finaliser: every bit of the input moves every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A batch in which every picture holds a part of another one.

    Its loss is `share * loss(own target) + (1 - share) * loss(partner's target)`, right for every
    loss whether or not it is linear in the targets.
    """

    images_BChw: Tensor
    partners_B: Tensor
    """Place in the batch of the picture that was mixed in (int64, on the pictures' device)."""
    share_B: Tensor
    """Weight of the picture's own target, 0 to 1 (float32, on the pictures' device)."""


def mix(
    images_BChw: Tensor,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    seed: int | Sequence[int],
) -> Mixed:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch of float pictures.

    The share is drawn from Beta(alpha, alpha) once a batch, and for cutmix corrected to the area
    that was left. An alpha of 0 is without that method; with both, each batch takes either by
    chance. Partners are a random permutation of the batch. The input is not changed.
    """
    random = np.random.default_rng(seed)
    size, device = len(images_BChw), images_BChw.device
    if not mixup_alpha and not cutmix_alpha:
        own_B = torch.arange(size, device=device)
        return Mixed(
            images_BChw=images_BChw, partners_B=own_B, share_B=torch.ones(size, device=device)
        )
    partners_B = torch.from_numpy(random.permutation(size)).to(device)
    cut = random.random() < 0.5 if mixup_alpha and cutmix_alpha else bool(cutmix_alpha)
    alpha = cutmix_alpha if cut else mixup_alpha
    share = random.beta(alpha, alpha)
    if cut:
        height, width = images_BChw.shape[2:]
        y, x, share = _hole(height, width, share, random)
        mixed = images_BChw.clone()
        mixed[:, :, y, x] = images_BChw[:, :, y, x][partners_B]
    else:
        # Indexing keeps the memory format, as index_select does not; and in place: no third copy.
        mixed = images_BChw[partners_B].lerp_(images_BChw, share)
    share_B = torch.full((size,), share, dtype=torch.float32, device=device)
    return Mixed(images_BChw=mixed, partners_B=partners_B, share_B=share_B)


def _hole(
    height: int, width: int, share: float, random: np.random.Generator
) -> tuple[slice, slice, float]:
    """Rows and columns that cutmix takes from the partner, and the share of the area that stays.

    The middle is anywhere, so that the hole may reach beyond the edge and be smaller for it.
    """
    half = 0.5 * np.sqrt(1 - share)
    sides = []
    for length in (height, width):
        middle, reach = int(random.integers(length)), int(half * length)
        sides.append(slice(max(middle - reach, 0), min(middle + reach, length)))
    rows, columns = sides
    hole = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, 1 - hole / (height * width)
