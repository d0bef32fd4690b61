"""A short measurement of this machine, where no study has shown a speed that a quote needs.

A few pictures through each backbone, one epoch of a small cohort of drawn heads on random features
of the right width, one epoch of a fine-tuning on a few pictures: the same code that a study runs,
so that what a stack, its threads and this precision cost is in it. It ends when its time is over,
and what it did not come to is taken from what it did (`tuner.budgets.quote`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from core.config import TrialConfig
from core.encoding.encoders import Encoder
from core.encoding.features import PIXELS, encode
from core.finetuning.finetune import finetune
from core.images.pictures import decode_square, open_picture
from core.probing.probe import train_probes

from ..trials.context import FeatureRequest, request_of
from .calibration import Note
from .prices import Features, key_of
from .speeds import training_key

MOST_SECONDS = 20.0
"""A dry run measures for so long at most."""
DECODED, ENCODED, TUNED = 8, 16, 16
"""Pictures that are decoded; that go through a backbone at once; that a fine-tuning trains on."""
ROWS = 256
"""Of random features that heads are trained on; a quarter more are looked at after the epoch."""
HEADS = 16
"""Of one cohort at most."""


@dataclass(kw_only=True)
class Stopwatch:
    """What may be measured still."""

    seconds: float
    """That are left; they are taken by whatever is timed."""

    @contextmanager
    def timing(self) -> Iterator[list[float]]:
        """Yields a list that has the block's seconds once it has ended."""
        taken: list[float] = []
        started = time.perf_counter()
        yield taken
        taken.append(time.perf_counter() - started)
        self.seconds -= taken[0]

    @property
    def left(self) -> bool:
        return self.seconds > 0


def measure_features(
    encoder: Encoder,
    wanted: Sequence[Features],
    *,
    files: Sequence[Path],
    device: str,
    precision: str,
    threads: int,
    watch: Stopwatch,
) -> list[Note]:
    """Speeds of matrices of one encoder: seconds a picture from decoded squares, and from files."""
    size, resize = encoder.backbone.input_size, encoder.backbone.resize
    pictures = _random_pictures(ENCODED, size)
    decoding: float | None = None
    notes: list[Note] = []
    for features in wanted:
        if not watch.left:
            break
        if decoding is None and features.decodes:
            some = files[:: max(1, len(files) // DECODED)][:DECODED]
            with watch.timing() as taken:
                for file in some:
                    decode_square(open_picture(file), size, resize=resize)
            decoding = taken[0] / len(some) / threads
        request = features.request
        passing = 0.0
        if request.pooling != PIXELS:
            encoder.to(_torch_device()).to(memory_format=torch.channels_last).eval()
            for count in (2, ENCODED):  # The first pass sets itself up.
                with watch.timing() as taken:
                    encode(
                        encoder,
                        pictures[:count],
                        pooling=request.pooling,
                        blocks=request.blocks,
                        precision=_precision_of(encoder, precision),
                        device=_torch_device(),
                    ).cpu()  # A GPU is waited for.
            passing = taken[0] / ENCODED
        if features.decodes and decoding is not None:
            passing += decoding
        notes.append((key_of(features, device, precision), passing))
    return notes


def measure_heads(
    configs: Sequence[TrialConfig],
    shapes: Mapping[FeatureRequest, tuple[int, ...]],
    *,
    num_classes: int,
    device: str,
    precision: str,
    watch: Stopwatch,
) -> list[Note]:
    """Speeds of the heads of some configurations, those on the same features as one cohort.

    Args:
        shapes: of one picture's features.
        num_classes: of the table.
    """
    groups: dict[FeatureRequest, list[TrialConfig]] = defaultdict(list)
    for config in configs:
        groups[request_of(config)].append(replace(config, views="plain"))
    chance = np.random.default_rng(0)
    targets = torch.from_numpy(chance.integers(0, 2, (ROWS * 5 // 4, num_classes))).float()
    rows = np.arange(ROWS * 5 // 4)
    notes: dict[str, list[float]] = defaultdict(list)
    for request, members in groups.items():
        if not watch.left:
            break
        matrix = chance.standard_normal((len(rows), *shapes[request]), dtype=np.float32)
        cohort = members[:HEADS]
        with watch.timing():
            outcomes = train_probes(
                matrix,
                targets,
                [(rows[:ROWS], rows[ROWS:])],
                cohort,
                precision=precision,
                device=_torch_device(),
                last_epoch=1,
            )
        for config, outcome in zip(cohort, outcomes, strict=True):
            each = outcome.seconds / ROWS * 1000
            notes[training_key(device, precision, config)].append(each)
    return [(key, sum(values) / len(values)) for key, values in notes.items()]


def measure_finetuning(
    encoder: Encoder,
    configs: Sequence[TrialConfig],
    *,
    num_classes: int,
    device: str,
    precision: str,
    watch: Stopwatch,
) -> list[Note]:
    """Speeds of fine-tuning `encoder`, which is changed; one for each number of stages."""
    by_key = {training_key(device, precision, config): config for config in configs}
    chance = np.random.default_rng(0)
    pictures = _random_pictures(TUNED + 4, encoder.backbone.input_size)
    targets = torch.from_numpy(chance.integers(0, 2, (len(pictures), num_classes))).float()
    rows = np.arange(len(pictures))
    notes: list[Note] = []
    for key, config in by_key.items():
        if not watch.left:
            break
        small = replace(
            config,
            batch_size=min(config.batch_size, TUNED // 2),
            accumulation_steps=1,
            head_start="random",
        )
        with watch.timing():
            outcome = finetune(
                encoder,
                pictures,
                targets,
                rows[:TUNED],
                rows[TUNED:],
                small,
                report=lambda epoch, metrics: False,
                precision=precision,
                device=_torch_device(),
                last_epoch=1,
            )
        notes.append((key, outcome.seconds / TUNED * 1000))
    return notes


def _random_pictures(count: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _precision_of(encoder: Encoder, precision: str) -> str:
    return precision if encoder.backbone.trainable else "float32"


def _torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
