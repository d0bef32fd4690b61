"""Have every kernel ready: compiled, which takes some seconds once a machine, or loaded.

`make setup` runs it as a program; whoever times training calls it before.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .losses import LOSS_KERNELS
from .ranks import find_hits
from .updates import UPDATE_KERNELS


@cache
def load_kernels() -> None:
    """Call each kernel once, with the types that stacks of heads give it."""
    num_classes = 2
    logits_HL, targets_L = np.zeros((1, num_classes), np.float32), np.zeros(2, np.float32)
    weights_HC, values_H = np.ones((1, num_classes), np.float32), np.zeros(1, np.float32)
    for loss in LOSS_KERNELS.values():
        parameters = [values_H] * len(loss.parameters)
        loss.function(
            logits_HL, targets_L, weights_HC, values_H, *parameters, np.zeros(1), logits_HL.copy()
        )
    settings_H, bits_HK = np.zeros(1), np.empty((1, 0), np.uint16)
    for update in UPDATE_KERNELS.values():
        slots = tuple(np.zeros((1, 1), np.float32) for _ in range(update.num_slots))
        update.function(
            np.zeros((1, 1), np.float32),
            np.zeros((1, 1), np.float32),
            bits_HK,
            bits_HK,
            slots,
            settings_H,
            *[settings_H] * len(update.parameters),
            settings_H,
            1,
        )
    places_P, hit_HP = np.zeros(1, np.int64), np.zeros((1, 1), np.bool_)
    for scores in (np.zeros(2, np.float32), np.zeros(2)):
        find_hits(scores, 0, 0, num_classes, places_P, places_P, 1, hit_HP)


if __name__ == "__main__":
    load_kernels()
