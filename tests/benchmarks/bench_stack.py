"""Bar 3: a cohort of 256 heads against its bare matrix products.

Bare: for every batch the products of forward and backward, and the evaluation's forward products,
of the same shapes, type and threads, on tensors that are there already; no loss, no update, no
metric, no bias. Also how trials/s grow with the number of heads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import (
    NUM_CLASSES,
    NUM_IMAGES,
    Bench,
    benchmark,
    console,
    medians,
    random_features,
    random_targets,
    show,
    split_rows,
    verdict,
)

from core.config import TrialConfig
from core.losses import LOSSES
from core.optimizers import OPTIMIZERS
from core.probing.probe import train_probes

NUM_FEATURES = 1280  # of mobilenet_v2
BATCH = 256
HEADS = 256
HIDDEN = 256
EPOCHS_OF_A_TRIAL = 30


def mix(num_heads: int, *, epochs: int, head: str) -> list[TrialConfig]:
    """Heads of every optimizer and loss in turn, rates and decays apart."""
    pairs = itertools.cycle(itertools.product(sorted(OPTIMIZERS), sorted(LOSSES)))
    return [
        TrialConfig(
            backbone="mobilenet_v2",
            head=head,
            hidden_sizes=(HIDDEN,) if head == "mlp" else (),
            optimizer=optimizer,
            loss=loss,
            momentum=0.9 if optimizer == "sgd" else 0.0,
            lr=1e-4 * (1 + place % 20),
            weight_decay=1e-3 * (place % 7),
            label_smoothing=0.05 * (place % 3),
            schedule="cosine",
            warmup_fraction=0.1,
            epochs=epochs,
            batch_size=BATCH,
            seed=place,
        )
        for place, (optimizer, loss) in zip(range(num_heads), pairs, strict=False)
    ]


class Cohort:
    """The data of one table, and both ways of spending time on it."""

    def __init__(self, num_images: int) -> None:
        self.features = random_features(num_images, NUM_FEATURES)
        self.targets = random_targets(num_images)
        self.train, self.validation = split_rows(num_images)
        self.batches = [
            len(self.train[start : start + BATCH]) for start in range(0, len(self.train), BATCH)
        ]

    def ours(self, num_heads: int, *, epochs: int, head: str) -> Callable[[], object]:
        """The cohort as a worker trains it: scaling, set-up and all metrics included."""
        configs = mix(num_heads, epochs=epochs, head=head)
        folds = [(self.train, self.validation)]
        return lambda: train_probes(self.features, self.targets, folds, configs)

    def bare(self, num_heads: int, *, epochs: int, head: str) -> Callable[[], object]:
        """Its products alone."""
        products = LinearProducts(num_heads) if head == "linear" else MlpProducts(num_heads)
        # A sample of the training rows as large as the validation part is evaluated, too.
        evaluated = [len(self.validation)] * 2

        def run() -> None:
            for _ in range(epochs):
                for size in self.batches:
                    products.forward(size)
                    products.backward(size)
                for size in evaluated:
                    for start in range(0, size, products.rows):
                        products.forward(min(products.rows, size - start))

        return run


class LinearProducts:
    rows = 2048
    """At most so many pictures in one call."""

    def __init__(self, num_heads: int) -> None:
        self.x = torch.randn(self.rows, NUM_FEATURES)
        self.weights = torch.randn(num_heads * NUM_CLASSES, NUM_FEATURES)
        self.gradient = torch.randn(BATCH, num_heads * NUM_CLASSES)

    def forward(self, size: int) -> None:
        F.linear(self.x[:size], self.weights)

    def backward(self, size: int) -> None:
        self.gradient[:size].t() @ self.x[:size]


class MlpProducts:
    rows = BATCH

    def __init__(self, num_heads: int) -> None:
        self.x = torch.randn(self.rows, NUM_FEATURES)
        self.first = torch.randn(num_heads * HIDDEN, NUM_FEATURES)
        self.second_HCK = torch.randn(num_heads, NUM_CLASSES, HIDDEN)
        self.hidden_HKB = torch.randn(num_heads, HIDDEN, BATCH)
        self.gradient_HCB = torch.randn(num_heads, NUM_CLASSES, BATCH)

    def forward(self, size: int) -> None:
        F.linear(self.x[:size], self.first)
        torch.bmm(self.second_HCK, self.hidden_HKB[:, :, :size])

    def backward(self, size: int) -> None:
        gradient_HCB = self.gradient_HCB[:, :, :size]
        torch.bmm(gradient_HCB, self.hidden_HKB[:, :, :size].transpose(1, 2))
        hidden_HKB = torch.bmm(self.second_HCK.transpose(1, 2), gradient_HCB)
        hidden_HKB.flatten(0, 1) @ self.x[:size]


def compare(bench: Bench, head: str, *, num_images: int, epochs: int, heads: int) -> dict[str, Any]:
    cohort = Cohort(num_images)
    jobs = {
        "ours": cohort.ours(heads, epochs=epochs, head=head),
        "bare": cohort.bare(heads, epochs=epochs, head=head),
    }
    seconds = medians(jobs, repeats=bench.size(3, 1))
    return {
        "cohort": f"{heads} {head} heads" + (f" [{HIDDEN}]" if head == "mlp" else ""),
        "epochs": epochs,
        "pictures": num_images,
        "ours, s": seconds["ours"],
        "bare products, s": seconds["bare"],
        "ratio": seconds["ours"] / seconds["bare"],
    }


def by_size(bench: Bench, num_images: int) -> list[dict[str, Any]]:
    """Trials/s of linear cohorts; what one epoch costs is the difference of two lengths."""
    cohort = Cohort(num_images)
    rows = []
    for num_heads in (1, 4, 16) if bench.quick else (1, 4, 16, 64, 256):
        seconds = {}
        for epochs in (1, 3):
            started = time.perf_counter()
            cohort.ours(num_heads, epochs=epochs, head="linear")()
            seconds[epochs] = time.perf_counter() - started
        epoch = max(1e-9, (seconds[3] - seconds[1]) / 2)
        whole = seconds[1] + (EPOCHS_OF_A_TRIAL - 1) * epoch
        rows.append(
            {
                "heads": num_heads,
                "an epoch, s": epoch,
                f"{EPOCHS_OF_A_TRIAL} epochs, s": whole,
                "trials/s": num_heads / whole,
                "against one head": num_heads / whole / rows[0]["trials/s"] if rows else 1.0,
            }
        )
    return rows


def main() -> None:
    with benchmark("stack", "a 256-head cohort against its bare matrix products") as bench:
        console.print(
            "random features of mobilenet_v2's shape; float32; medians of interleaved runs"
        )
        heads = bench.size(HEADS, 32)
        rows = [
            compare(bench, "linear", num_images=bench.size(NUM_IMAGES, 800),
                    epochs=bench.size(6, 2), heads=heads),
            compare(bench, "mlp", num_images=bench.size(2000, 600),
                    epochs=bench.size(2, 1), heads=bench.size(HEADS, 8)),
        ]  # fmt: skip
        show("a mix of all optimizers and losses", rows)
        sizes = by_size(bench, bench.size(NUM_IMAGES, 800))
        show(f"linear heads by cohort, at {EPOCHS_OF_A_TRIAL} epochs (two lengths measured)", sizes)
        bench.figures.update(rows=rows, by_size=sizes)
        bench.figures["met"] = [
            verdict(f"{row['cohort']} over bare products", figure=row["ratio"], at_most=2)
            for row in rows
        ]


if __name__ == "__main__":
    np.random.seed(0)
    torch.manual_seed(0)
    main()
