"""A saved classifier as it predicts: from picture bytes to one probability a class.

One model, or several whose probabilities are averaged. Members that share a backbone share its
forward pass, and each picture is decoded once a picture size. This file travels in MLflow models
under another package name, so its imports are relative, and none leads to training code.
N: pictures, C: classes, D: features, B: batch, h w: spatial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..encoding.encoders import Encoder
from ..encoding.pooling import pool
from ..errors import InputError
from ..images.pictures import decode_square, default_threads, open_picture
from .ensemble import mean_logits

Squares = npt.NDArray[np.uint8]
Source = tuple[int, str]
"""How pictures are squared: side in pixels, and `Backbone.resize`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """An encoder with a head on it, and its share in an ensemble."""

    encoder: Encoder
    """Members may hold the same one."""
    head: nn.Module
    head_spec: Mapping[str, Any] = field(default_factory=dict)
    """`{"kind": ..., **settings}` as `build_head` takes them."""
    pooling: str
    blocks: int = 1
    """As for `pooled_features`; a spatial head reads neither."""
    feature_mean_D: Tensor | None = None
    feature_std_D: Tensor | None = None
    """The head sees (features - mean) / std where both are given."""
    calibration: tuple[float, float] = (1.0, 0.0)
    """(scale, bias) of the member's own probability in an ensemble; a model of one member has the
    classifier's alone."""
    weight: float = 1.0
    """Share in the ensemble's mean probability."""

    @property
    def spatial(self) -> bool:
        return bool(getattr(self.head, "spatial", False))

    @property
    def source(self) -> Source:
        return self.encoder.backbone.input_size, self.encoder.backbone.resize

    def logits(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, C] of the maps [B, D, h, w] of the encoder's last stages, at least `blocks` of
        them, the last one last."""
        if self.spatial:
            features = maps[-1]
        else:
            pooled = [pool(map_BDhw.float(), self.pooling) for map_BDhw in maps[-self.blocks :]]
            features = torch.cat(pooled, dim=1)
        mean, std = self.feature_mean_D, self.feature_std_D
        if mean is not None and std is not None:
            shape = (-1, 1, 1) if self.spatial else (-1,)
            features = (features - mean.view(shape)) / std.view(shape)
        logits_BC: Tensor = self.head(features)
        return logits_BC

    def to(self, device: str | torch.device) -> Member:
        """The member on a device, ready to predict; its modules are moved themselves."""
        mean, std = self.feature_mean_D, self.feature_std_D
        return replace(
            self,
            encoder=self.encoder.to(device).to(memory_format=torch.channels_last).eval(),
            head=self.head.to(device).eval(),
            feature_mean_D=None if mean is None else mean.to(device),
            feature_std_D=None if std is None else std.to(device),
        )


class Classifier:
    """A loaded model. Made by `core.models.model.load_model`; safe to call from several threads.

    Args:
        members: one, or those of an ensemble.
        class_names: in the order of the logits.
        calibration: (scale, bias): a probability is sigmoid(scale * logit + bias), where an
            ensemble's logit is that of its mean probability.
        thresholds: probability from which a class counts as predicted, one a class; None: not
            tuned.
        metadata: what was saved with the model.
        device: where to compute.
    """

    def __init__(
        self,
        *,
        members: Sequence[Member],
        class_names: Sequence[str],
        calibration: tuple[float, float],
        thresholds: Sequence[float] | None,
        metadata: Mapping[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.class_names = tuple(class_names)
        self.thresholds = None if thresholds is None else tuple(thresholds)
        self.metadata = dict(metadata)
        self._members = [member.to(device) for member in members]
        self._sources = list(dict.fromkeys(member.source for member in members))
        self._scale, self._bias = calibration
        self._device = device
        self.input_size = max(size for size, _ in self._sources)
        """Side of the square that a picture becomes; of several, the largest."""

    @property
    def members(self) -> tuple[Member, ...]:
        """On the device, as they predict."""
        return tuple(self._members)

    def predict(
        self, pictures: Sequence[bytes | Path], *, batch_size: int = 32
    ) -> npt.NDArray[np.float32]:
        """Probabilities [N, C] in the order of `class_names`.

        `pictures` are encoded image files (any format that Pillow reads) or their paths. Raises
        InputError naming the row, counted from 0, of a picture that cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size >= 1 must hold, but got {batch_size=}")
        parts = [np.empty((0, len(self.class_names)), np.float32)]
        with ThreadPoolExecutor(default_threads()) as threads:
            for start in range(0, len(pictures), batch_size):
                batch = pictures[start : start + batch_size]
                rows = range(start, start + len(batch))
                squares_B = list(threads.map(self._decode, rows, batch))
                stacked = [np.stack(column) for column in zip(*squares_B, strict=True)]
                parts.append(self._predict_squares(stacked))
        return np.concatenate(parts)

    def _decode(self, row: int, picture: bytes | Path) -> list[Squares]:
        """One square for each of `_sources`."""
        try:
            image = open_picture(picture)
        except InputError as error:
            raise InputError(error.problem, where=f"row {row}", hint=error.hint) from error
        return [decode_square(image, size, resize=resize) for size, resize in self._sources]

    @torch.inference_mode()
    def _predict_squares(self, squares: Sequence[Squares]) -> npt.NDArray[np.float32]:
        """Probabilities [B, C] of one array [B, size, size, 3] for each of `_sources`."""
        images = {}
        for source, array in zip(self._sources, squares, strict=True):
            block = torch.from_numpy(array).to(self._device).permute(0, 3, 1, 2)
            images[source] = block.float().div(255)
        logits = self._member_logits(images)
        if len(self._members) == 1:
            (logits_BC,) = logits
        else:
            logits_BC = mean_logits(
                logits,
                calibrations=[member.calibration for member in self._members],
                weights=[member.weight for member in self._members],
            )
        logits_BC = logits_BC * self._scale + self._bias
        if not all(bool(torch.isfinite(scores).all()) for scores in (*logits, logits_BC)):
            raise RuntimeError("the model gave a score that is not a finite number")
        probabilities: npt.NDArray[np.float32] = torch.sigmoid(logits_BC).cpu().numpy()
        return probabilities

    def _member_logits(self, images: Mapping[Source, Tensor]) -> list[Tensor]:
        """Logits [B, C] of each member; a backbone runs once for all that read it."""
        deepest: dict[Encoder, int] = {}
        for member in self._members:
            blocks = 1 if member.spatial else member.blocks
            deepest[member.encoder] = max(blocks, deepest.get(member.encoder, 1))
        maps: dict[Encoder, list[Tensor]] = {}
        logits = []
        for member in self._members:
            encoder = member.encoder
            if encoder not in maps:
                found = encoder.forward_blocks(images[member.source], deepest[encoder])
                maps[encoder] = [map_BDhw.to(self._device) for map_BDhw in found]
            logits.append(member.logits(maps[encoder]))
        return logits
