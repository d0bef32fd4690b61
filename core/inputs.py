"""What heads read: a backbone's features of all rows, scaled and served in batches.

Pooled features [N, D] are scaled once and kept in memory (on the device); feature maps [N, P, D]
stay on disk in half precision and are scaled batch by batch. N rows, D features, P places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatMatrix = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.int64]

_BLOCK_ROWS = 512


def feature_statistics(features: FloatMatrix, rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] (float32) of each feature over `rows` and all places.

    A feature that never changes has deviation 1, so that scaling leaves it at 0.
    """
    num_features = features.shape[-1]
    total = np.zeros(num_features)
    squares = np.zeros(num_features)
    count = 0
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = features[rows[start : start + _BLOCK_ROWS]].reshape(-1, num_features)
        block = block.astype(np.float64)
        total += block.sum(0)
        squares += np.square(block).sum(0)
        count += len(block)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    # Below this a difference of squares in float64 is rounding, not spread.
    constant = variance <= 1e-12 * np.maximum(squares / count, 1e-12)
    deviation = np.where(constant, 1.0, np.sqrt(variance))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()


class HeadInputs:
    """Scaled features of a table's rows, as heads read them.

    Args:
        features: [N, D] or [N, P, D], any float type; may be memory-mapped.
        norm: `standardize` by the statistics of `train_rows`, or `none`.
        train_rows: rows whose statistics count.
        device: where batches are wanted.
    """

    def __init__(
        self, features: FloatMatrix, *, norm: str, train_rows: Rows, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.num_features = int(features.shape[-1])
        self.num_places = int(features.shape[1]) if features.ndim == 3 else 1
        self.mean_D: Tensor | None = None
        self.deviation_D: Tensor | None = None
        if norm == "standardize":
            mean_D, deviation_D = feature_statistics(features, train_rows)
            self.mean_D, self.deviation_D = mean_D.to(device), deviation_D.to(device)
        self._features = features
        self._matrix_ND: Tensor | None = None
        if features.ndim == 2:
            matrix_ND = torch.from_numpy(np.array(features, dtype=np.float32)).to(self.device)
            self._matrix_ND = self._scale(matrix_ND)

    def batch(self, rows: Rows) -> Tensor:
        """Scaled float32 features of these rows on the device: [B, D] or [B, P, D]."""
        if self._matrix_ND is not None:
            return self._matrix_ND[torch.from_numpy(rows).to(self.device)]
        block = torch.from_numpy(np.ascontiguousarray(self._features[rows]))
        return self._scale(block.to(self.device).float())

    def _scale(self, features: Tensor) -> Tensor:
        if self.mean_D is None or self.deviation_D is None:
            return features
        return features.sub_(self.mean_D).div_(self.deviation_D)
