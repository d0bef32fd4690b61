"""Views: the same picture seen a little differently, so that probes can train on augmented data.

A frozen backbone computes the features of each view once, and training then picks one view of a
picture at random in every epoch, which costs nothing. So augmentation is a short fixed list here,
not a random transformation: N views are N passes of the backbone. The corner crops and their
mirror images follow Krizhevsky et al. (2012), who did so at test time with crops of 7/8 of a side;
they are taken from the decoded squares and resized back, and no picture is decoded again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from .pictures import default_threads

CROP_SHARE = 7 / 8
"""Side of a crop over the side of its picture."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of seeing a square picture."""

    name: str
    """Part of the features' key: a view that changes needs a new name."""
    corner: tuple[int, int] | None = None
    """Crop at the top (0) or bottom (1) and the left (0) or right (1); None for all of it."""
    mirrored: bool = False
    """Left and right change places, after the crop."""


PLAIN = View(name="plain")
MIRRORED = View(name="mirrored", mirrored=True)
CORNERS = tuple(
    View(
        name=f"{vertical}-{horizontal}{'-mirrored' if mirrored else ''}",
        corner=(bottom, right),
        mirrored=mirrored,
    )
    for bottom, vertical in enumerate(("top", "bottom"))
    for right, horizontal in enumerate(("left", "right"))
    for mirrored in (False, True)
)

VIEWS: dict[str, tuple[View, ...]] = {
    "plain": (PLAIN,),
    "flip": (PLAIN, MIRRORED),
    "flip_crop": (PLAIN, MIRRORED, *CORNERS),
}
"""What `TrialConfig.views` names -> the views that training draws from, the plain one first."""
BY_NAME = {view.name: view for views in VIEWS.values() for view in views}


def see(pictures_NhwC: npt.NDArray[np.uint8], view: View) -> npt.NDArray[np.uint8]:
    """Square uint8 pictures [N, size, size, 3] in a view, of the same shape."""
    if view.corner is not None:
        with ThreadPoolExecutor(default_threads()) as threads:
            crops = threads.map(partial(_corner_crop, view.corner), pictures_NhwC)
            pictures_NhwC = np.stack(list(crops))
    if view.mirrored:
        pictures_NhwC = np.ascontiguousarray(pictures_NhwC[:, :, ::-1])
    return pictures_NhwC


def _corner_crop(
    corner: tuple[int, int], picture_hwC: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """The crop at a corner, bicubic at the size of the whole."""
    bottom, right = corner
    size = len(picture_hwC)
    side = round(size * CROP_SHARE)
    top, left = bottom * (size - side), right * (size - side)
    crop = Image.fromarray(picture_hwC[top : top + side, left : left + side])
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
