"""Bar 4: extraction in pictures/s against the bare forward pass of the same backbone.

Bare: the encoder on float tensors in memory, same batch, precision and memory order. The first
pass decodes the pictures and keeps them; the second finds them decoded, as a second backbone does.
Both write features to disk with checksums. Beside the speeds stand the milliseconds of all cores a
picture: on a CPU decoding takes its share of the same cores, which bounds the first pass.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import Bench, benchmark, console, poster_table, show, verdict, weights_at_hand

from core.data.table import Table
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.features import (
    BATCH,
    compute_features,
    describe_features,
    feature_shape,
    feature_store,
)
from core.errors import InputError
from core.images.pixels import PixelSpec, PixelStore
from core.precision import autocast, inference_precision

# Fastest first; of the shipped spaces and the reference comparison.
PRETRAINED = ("squeezenet1_1", "mobilenet_v2", "onnx/resnet50v2_stage3.onnx")
RANDOM = ("squeezenet1_1", "vgg16")


def encoders() -> list[Encoder]:
    """The fastest and the slowest backbone at hand."""
    weights, weights_dir, _ = weights_at_hand()
    found = []
    for name in RANDOM if weights_dir is None else PRETRAINED:
        try:
            found.append(build_encoder(name, weights=weights, weights_dir=weights_dir))
        except InputError as error:
            console.print(f"left out: {name}: {error.problem}")
    return [found[0], found[-1]]


class Passes:
    """The three ways of one encoder over one table."""

    def __init__(self, bench: Bench, encoder: Encoder, table: Table) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = encoder.to(self.device).to(memory_format=torch.channels_last)
        self.table = table
        self.cache = bench.scratch / "cache"
        spec = describe_features(
            encoder,
            pictures="bench",
            pooling="avg",
            precision=inference_precision(self.device.type),
        )
        self.spec = spec
        size = spec.input_size
        images = torch.rand(BATCH, 3, size, size, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)

    def first(self) -> float:
        """Pictures/s with nothing in the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)
        return self._extract()

    def second(self) -> float:
        """Pictures/s with the pictures decoded already."""
        shutil.rmtree(self.cache / "features")
        return self._extract()

    @torch.inference_mode()
    def bare(self) -> float:
        """Pictures/s of the forward pass alone, on as many pictures."""
        sizes = [BATCH] * (self.table.num_images // BATCH)
        sizes += [self.table.num_images % BATCH] if self.table.num_images % BATCH else []
        started = time.perf_counter()
        with autocast(self.device, self.spec.precision):
            for size in sizes:
                self.encoder(self.images[:size])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.table.num_images / (time.perf_counter() - started)

    def _extract(self) -> float:
        paths: list[Path] = list(self.table.paths)
        started = time.perf_counter()
        pixels = PixelStore(
            self.cache,
            PixelSpec(pictures="bench", input_size=self.spec.input_size, resize=self.spec.resize),
            paths,
        )
        store = feature_store(
            self.cache,
            self.spec,
            num_images=self.table.num_images,
            row_shape=feature_shape(self.encoder, "avg"),
        )
        compute_features(
            self.encoder,
            store,
            pooling="avg",
            precision=self.spec.precision,
            pictures_of=pixels.fetch,
            shards=store.missing_shards(),
            device=self.device,
        )
        return self.table.num_images / (time.perf_counter() - started)


def measure(bench: Bench, encoder: Encoder, table: Table) -> dict[str, Any]:
    """Medians over rounds of bare, first and second pass in turn."""
    passes = Passes(bench, encoder, table)
    passes.bare()
    speeds: dict[str, list[float]] = {"bare": [], "first": [], "second": []}
    costs: dict[str, list[float]] = {name: [] for name in speeds}
    for _ in range(bench.size(3, 1)):
        for name, values in speeds.items():
            started = time.process_time()
            values.append(getattr(passes, name)())
            costs[name].append((time.process_time() - started) / table.num_images * 1000)
    bare, first, second = (statistics.median(values) for values in speeds.values())
    cores = {name: statistics.median(values) for name, values in costs.items()}
    return {
        "backbone": encoder.backbone.name,
        "precision": passes.spec.precision,
        "bare forward, pictures/s": bare,
        "first pass": first,
        "second pass": second,
        "first/bare": first / bare,
        "second/bare": second / bare,
        "core ms, bare": cores["bare"],
        "core ms, first": cores["first"],
        "core ms, second": cores["second"],
    }


def main() -> None:
    with benchmark("extraction", "pictures/s against the bare forward pass") as bench:
        fast, slow = encoders()
        _, _, weights = weights_at_hand()
        num_fast, num_slow = bench.size(1536, 96), bench.size(384, 32)
        table, what = poster_table(bench, num_fast)
        console.print(f"{what}, {weights}, batches of {BATCH}; the slow backbone sees {num_slow}")
        rows = [
            measure(bench, fast, table),
            measure(bench, slow, table.select(range(num_slow))),
        ]
        show("fastest and slowest backbone at hand", rows)
        bench.figures.update(rows=rows, data=what, weights=weights)
        bench.figures["met"] = [
            verdict(f"{row['backbone']}, {which}", figure=row[f"{which}/bare"], at_least=0.9)
            for row in rows
            for which in ("first", "second")
        ]


if __name__ == "__main__":
    main()
