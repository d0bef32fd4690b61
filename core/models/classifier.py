"""Encoder, pooling, feature scaling and head as one module, and how it is put together and run.

The scaling in front of the head is that of the training pictures' features before training, as
for probes; a head taken over from a probe brings its own. N pictures, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..encoding.encoders import Encoder
from ..encoding.features import MAP, encode
from ..encoding.inputs import Rows, feature_statistics
from ..encoding.pooling import num_head_features, pooled_features
from ..errors import InputError
from ..finetuning.batches import as_images, over_ranks
from ..finetuning.ranks import ALONE, Ranks
from ..heads import HEADS, build_head
from ..images.pixels import Pictures
from ..precision import FLOAT32, autocast

STATISTICS_ROWS = 1024
"""Training pictures whose features set the scaling in front of the head."""
EVALUATION_BATCH = 64
SCALING = ("mean_D", "deviation_D")


class PictureClassifier(nn.Module):
    """Encoder, pooling, feature scaling and head as one module: pictures to logits."""

    mean_D: Tensor
    deviation_D: Tensor

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        *,
        pooling: str,
        blocks: int = 1,
        mean_D: Tensor | None = None,
        deviation_D: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.pooling = pooling
        self.blocks = blocks
        self.spatial = bool(getattr(head, "spatial", False))
        size = num_head_features(encoder, spatial=self.spatial, pooling=pooling, blocks=blocks)
        self.register_buffer("mean_D", torch.zeros(size) if mean_D is None else mean_D)
        self.register_buffer(
            "deviation_D", torch.ones(size) if deviation_D is None else deviation_D
        )

    def forward(self, images_N3hw: Tensor) -> Tensor:
        """Float pictures [N, 3, S, S] in 0..1 to logits [N, C]."""
        mean, deviation = self.mean_D, self.deviation_D
        if self.spatial:
            features = self.encoder(images_N3hw)
            mean, deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
        else:
            features = pooled_features(
                self.encoder, images_N3hw, pooling=self.pooling, blocks=self.blocks
            )
        logits: Tensor = self.head((features - mean) / deviation)
        return logits


def build_classifier(
    encoder: Encoder,
    head_settings: Mapping[str, Any],
    *,
    num_classes: int,
    pooling: str,
    blocks: int,
    device: torch.device | str,
    head_state: Mapping[str, Tensor] | None = None,
) -> PictureClassifier:
    """A classifier on the device, not scaled yet, its convolutions in channels-last order.

    Args:
        head_settings: what `core.heads.build_head` takes, with its `kind`.
        head_state: the head's weights instead of random ones, by their names in the head; may
            hold the scaling that they were trained behind, too (`mean_D`, `deviation_D`).

    Raises:
        InputError: `head_state` is of another head.
    """
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    spatial = HEADS[head_settings["kind"]].spatial
    num_features = num_head_features(encoder, spatial=spatial, pooling=pooling, blocks=blocks)
    head = build_head(num_features=num_features, num_classes=num_classes, **head_settings)
    model = PictureClassifier(encoder, head, pooling=pooling, blocks=blocks)
    if head_state is not None:
        weights = {name: value for name, value in head_state.items() if name not in SCALING}
        try:
            head.load_state_dict(weights)
            for name in SCALING:
                getattr(model, name).copy_(head_state.get(name, getattr(model, name)))
        except RuntimeError as error:
            raise InputError(
                f"the weights to start from are of another head: {error}",
                where="head_start",
                hint="take those of a probe with the same backbone, head, pooling and blocks",
            ) from error
    return model.to(device)


@torch.no_grad()
def scale_features(
    model: PictureClassifier,
    pictures: Pictures,
    train: Rows,
    *,
    precision: str = FLOAT32,
    ranks: Ranks = ALONE,
) -> None:
    """Set the scaling in front of the head to the statistics of the training pictures' features.

    The same sample for every trial: spread over the training rows, in order.
    """
    sample = train[:: max(1, len(train) // STATISTICS_ROWS)][:STATISTICS_ROWS]

    def features(images: Tensor) -> Tensor:
        return encode(
            model.encoder,
            images.numpy(),
            pooling=MAP if model.spatial else model.pooling,
            blocks=model.blocks,
            precision=precision,
            device=model.mean_D.device,
        ).cpu()

    matrix = over_ranks(
        features, pictures, sample, block_size=EVALUATION_BATCH, ranks=ranks, pin=False
    ).numpy()
    mean_D, deviation_D = feature_statistics(matrix, np.arange(len(matrix)))
    model.mean_D.copy_(mean_D)
    model.deviation_D.copy_(deviation_D)


@torch.inference_mode()
def picture_logits(
    model: PictureClassifier,
    pictures: Pictures,
    rows: Rows,
    device: torch.device | str,
    *,
    precision: str = FLOAT32,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Logits [n, C] (float32) of some rows of uint8 pictures, in evaluation mode.

    Every rank computes a part and gets the whole. The blocks are the same for any number of ranks,
    and so are the logits.
    """
    model.eval()

    def logits(images: Tensor) -> Tensor:
        with autocast(device, precision):
            logits_BC: Tensor = model(as_images(images.to(device, non_blocking=True)))
        return logits_BC.float()

    pin = torch.device(device).type == "cuda"
    return over_ranks(logits, pictures, rows, block_size=EVALUATION_BATCH, ranks=ranks, pin=pin)
