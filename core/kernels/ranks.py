"""Which labels are among the highest scores of their pictures, on a CPU.

The contract is a sort (tests/core/test_metrics.py). H heads, N pictures, P true labels, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .compiled import compiled

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]


@compiled
def find_hits(
    scores: Floats,
    head_stride: int,
    picture_stride: int,
    num_classes: int,
    picture_P: Places,
    label_P: Places,
    k: int,
    hit_HP: npt.NDArray[np.bool_],
) -> None:
    """Write which labels are among the k highest scores of their picture, and of those that score
    the same the lowest.

    Args:
        scores: all of them in memory's order, the classes of a picture side by side.
        head_stride: from a head's scores to the next one's.
        picture_stride: from a picture's to the next one's.
        picture_P: of each label.
    """
    num_heads, num_labels = hit_HP.shape
    for h in range(num_heads):
        for p in range(num_labels):
            first, label = h * head_stride + picture_P[p] * picture_stride, label_P[p]
            score_C = scores[first : first + num_classes]
            own, before = score_C[label], np.int32(0)
            for c in range(num_classes):
                before += np.int32(score_C[c] > own)
            if before < k:
                for c in range(label):
                    before += np.int32(score_C[c] == own)
            hit_HP[h, p] = before < k
