"""The encoders of a study that is to be quoted: what the cache holds of their features, and how
fast they are where no study has shown it. Nothing is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from core.encoding.encoders import Encoder, build_encoder, weights_fingerprint
from core.encoding.features import PIXELS, describe_features
from core.images.pixels import PixelSpec

from ..features.cache import list_stores
from .calibration import Calibration, Note
from .prices import Features, key_of
from .quote import Part
from .speed_test import Stopwatch, measure_features, measure_finetuning
from .speeds import device_name, training_key

if TYPE_CHECKING:
    from ..studies.plan import Plan
    from .quoting import Subject


def look_at_encoders(
    subject: Subject, plans: Sequence[Plan], precision: str
) -> Iterator[tuple[Encoder, list[Features]]]:
    """Every encoder that the plans' trials read, one at a time in memory, with how much of its
    matrices the cache holds. Nothing is made there."""
    done = {store.folder: store.num_done for store in list_stores(subject.home.cache)}
    pictures = subject.table.picture_fingerprint()
    requests = sorted({request for plan in plans for request in plan.requests})
    for (backbone, size), group in itertools.groupby(
        requests, key=lambda request: (request.backbone, request.image_size)
    ):
        encoder = build_encoder(
            backbone,
            weights=subject.weights,
            weights_dir=subject.weights_dir,
            input_size=size or None,
        )
        weights = weights_fingerprint(encoder)
        spec = PixelSpec(
            pictures=pictures,
            input_size=encoder.backbone.input_size,
            resize=encoder.backbone.resize,
        )
        num_decoded = done.get(subject.home.cache / "pixels" / spec.key, 0)
        found: list[Features] = []
        for request in group:
            num_cached = num_decoded
            if request.pooling != PIXELS:
                described = describe_features(
                    encoder,
                    pictures=pictures,
                    pooling=request.pooling,
                    blocks=request.blocks,
                    view=request.view,
                    precision=precision,
                    weights=weights,
                )
                num_cached = done.get(subject.home.cache / "features" / described.key, 0)
            # Of the matrices of one size, the first has the pictures decoded.
            decodes = num_decoded < subject.table.num_images and not found
            found.append(
                Features(
                    request=request,
                    num_images=subject.table.num_images,
                    num_cached=num_cached,
                    decodes=decodes or request.pooling == PIXELS,
                )
            )
        yield encoder, found


def measure_encoder(
    encoder: Encoder,
    features: Sequence[Features],
    parts: Sequence[Part],
    subject: Subject,
    precision: str,
    calibration: Calibration,
    watch: Stopwatch,
) -> list[Note]:
    """What no study has shown of an encoder, as far as the time allows. Fine-tuning comes last: it
    changes the encoder."""
    device = device_name(subject.workers)
    unknown = [
        one
        for one in features
        if one.num_cached < one.num_images
        and calibration.number(key_of(one, device, precision)) is None
    ]
    notes = measure_features(
        encoder,
        unknown,
        files=subject.table.paths,
        device=device,
        precision=precision,
        threads=subject.workers.num_threads,
        watch=watch,
    )
    for part in parts:
        if part.space.mode != "finetune":
            continue
        trainer = part.trainers.device
        size = encoder.backbone.input_size
        configs = [
            config
            for config in part.configs
            if config.backbone == encoder.backbone.name
            and (config.image_size or size) == size
            and calibration.number(training_key(trainer, precision, config)) is None
        ]
        notes += measure_finetuning(
            encoder,
            configs,
            num_classes=subject.table.num_classes,
            device=trainer,
            precision=precision,
            watch=watch,
        )
    return notes
