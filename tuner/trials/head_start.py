"""Heads that fine-tuning starts from: those of the best probes, with the feature scaling in front.

A head's weights mean something only behind the scaling that they were trained with, and a
fine-tuned head scales by a sample of the training rows of its own: so the probe's scaling travels
along, as `mean_D` and `deviation_D` (0 and 1 for a probe that read features as they are).
`tuner.trials.probe_heads` makes what is read here. D features.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import TrialConfig

from .context import Context

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "heads"


def head_state_for(context: Context, config: TrialConfig) -> dict[str, Tensor] | None:
    """What the head of a fine-tuning trial starts from: its state, named as in its module of
    `core.heads`, and `mean_D` and `deviation_D`, which scale the features in front of it.

    None for a head that starts at random: the trial wants that, or no probe of its structure was
    completed.
    """
    path = head_path(context.folder, config)
    if config.head_start != "probe" or not path.exists():
        return None
    from safetensors.torch import load_file

    return load_file(path)


def head_path(folder: Path, config: TrialConfig) -> Path:
    """Where the fine-tuning study in `folder` keeps the head for trials of this structure."""
    text = json.dumps(head_structure(config))
    return folder / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def head_structure(config: TrialConfig) -> list[object]:
    """What two heads must share for one to go on from the other: what they read, and their shape.
    Where features are pixels, their number depends on the picture's size, too."""
    from core.encoding.backbones import has_stages
    from core.heads import HEADS

    reads = ["map"] if HEADS[config.head].spatial else [config.pooling, config.blocks]
    size = [] if has_stages(config.backbone) else [config.image_size]
    return [config.backbone, config.head, list(config.hidden_sizes), *reads, *size]
