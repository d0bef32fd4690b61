"""What heads read: a backbone's features of all rows, scaled and served in batches.

Pooled features [N, D] are scaled once and kept in memory (on the device); feature maps [N, P, D]
stay on disk in half precision and are scaled batch by batch. With several views of each picture,
training reads them at random and everything else reads the first, the plain one, whose statistics
scale them all. N rows, D features, P places, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        further_views: matrices of the further views, as `features`, which is view 0.
    """

    def __init__(
        self,
        features: FloatMatrix,
        *,
        norm: str,
        train_rows: Rows,
        device: torch.device | str,
        further_views: Sequence[FloatMatrix] = (),
    ) -> None:
        self.device = torch.device(device)
        self.num_features = int(features.shape[-1])
        self.num_places = int(features.shape[1]) if features.ndim == 3 else 1
        self.mean_D: Tensor | None = None
        self.deviation_D: Tensor | None = None
        if norm == "standardize":
            mean_D, deviation_D = feature_statistics(features, train_rows)
            self.mean_D, self.deviation_D = mean_D.to(device), deviation_D.to(device)
        self._features = [features, *further_views]
        self._copies: dict[torch.dtype, Tensor] = {}
        """All views of all rows [V * N, D], scaled, in each type that was asked for."""
        if features.ndim == 2:
            copy = torch.empty(len(self._features), *features.shape, device=device)
            for matrix_ND, view in zip(copy, self._features, strict=True):
                for start in range(0, len(view), _BLOCK_ROWS):
                    block = np.array(view[start : start + _BLOCK_ROWS], dtype=np.float32)
                    matrix_ND[start : start + _BLOCK_ROWS].copy_(torch.from_numpy(block))
                self._scale(matrix_ND)
            self._copies[torch.float32] = copy.flatten(0, 1)

    def batch(
        self, rows: Rows, views: Rows | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Scaled features of these rows on the device: [B, D] or [B, P, D].

        `views` [B] says in which view each row is read; None: all in the plain one, which is 0.
        Pooled features are kept in memory in each `dtype` that was asked for.
        """
        if self._copies:
            if dtype not in self._copies:
                self._copies[dtype] = self._copies[torch.float32].to(dtype)
            places = rows if views is None else views * len(self._features[0]) + rows
            return self._copies[dtype].index_select(0, torch.from_numpy(places).to(self.device))
        if views is None:
            block = np.ascontiguousarray(self._features[0][rows])
        else:
            block = np.empty((len(rows), *self._features[0].shape[1:]), self._features[0].dtype)
            for view in np.unique(views):
                block[views == view] = self._features[view][rows[views == view]]
        return self._scale(torch.from_numpy(block).to(self.device).float()).to(dtype)

    def _scale(self, features: Tensor) -> Tensor:
        if self.mean_D is None or self.deviation_D is None:
            return features
        return features.sub_(self.mean_D).div_(self.deviation_D)
