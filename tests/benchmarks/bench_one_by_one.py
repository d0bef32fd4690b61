"""Bar 2: cohorts against one Tune trial each on the same cached features.

The baseline is as good as it gets without stacking: features scaled once and shared through Ray's
object store, reused actors, no loggers, no MLflow, one trial a core. Ours asks TPE, trains cohorts
and writes the journal, the outcome log and MLflow; the baseline then trains the very same trials.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ours
from measuring import NUM_IMAGES, Bench, benchmark, console, show, verdict

from tuner.cluster import cluster

BACKBONE, NUM_FEATURES = "mobilenet_v2", 1280
TRIALS = 64


def one_trial(job: Mapping[str, Any], features: Any, targets: Any, split: Any) -> None:
    """Train one head with torch's own optimizer; report every epoch."""
    import torch
    from ray import tune

    from core.config import TrialConfig
    from core.heads import build_head
    from core.losses import LOSSES
    from core.metrics import topk_recall
    from core.optimizers import OPTIMIZERS

    torch.set_num_threads(1)
    config = TrialConfig.from_dict(job["trial"])
    loss, rule = LOSSES[config.loss], OPTIMIZERS[config.optimizer]
    # Not copied: both lie in the object store, which gives them out read-only.
    features_ND, targets_NC = torch.from_numpy(features), torch.from_numpy(targets)
    head = build_head("linear", num_features=features_ND.shape[1], num_classes=targets_NC.shape[1])
    optimizer = rule.build(
        [{"params": list(head.parameters())}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        **{key: getattr(config, key) for key in rule.parameters},
    )
    settings = {key: getattr(config, key) for key in loss.parameters}
    rng = np.random.default_rng(config.seed)
    for epoch in range(config.epochs):
        order = rng.permutation(split["train"])
        for start in range(0, len(order), config.batch_size):
            rows = torch.from_numpy(order[start : start + config.batch_size])
            losses_B = loss.function(
                head(features_ND[rows]),
                targets_NC[rows],
                label_smoothing=config.label_smoothing,
                **settings,
            )
            optimizer.zero_grad()
            losses_B.mean().backward()
            optimizer.step()
        with torch.no_grad():
            rows = torch.from_numpy(split["validation"])
            value = float(topk_recall(head(features_ND[rows]), targets_NC[rows]))
        tune.report({"epoch": epoch + 1, "value": value})


def one_by_one(bench: Bench, prepared: ours.Prepared, features: Path) -> tuple[float, float]:
    """Seconds of all trials, each a Tune trial, and the best value."""
    from ray import tune

    matrix = np.load(features / "matrix.npy")
    split = prepared.context.split
    train_ND = matrix[split.train]
    scaled = (matrix - train_ND.mean(0)) / np.maximum(train_ND.std(0), 1e-6)
    trainable = tune.with_parameters(
        one_trial,
        features=scaled,
        targets=prepared.context.table.targets_NC.astype(np.float32),
        split={"train": split.train, "validation": split.validation},
    )
    started = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"trial": tune.grid_search(prepared.trials)},
        tune_config=tune.TuneConfig(reuse_actors=True, metric="value", mode="max"),
        run_config=tune.RunConfig(
            name="one-by-one", storage_path=str(bench.scratch / "tune"), verbose=0
        ),
    ).fit()
    seconds = time.perf_counter() - started
    if results.num_errors:
        raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
    return seconds, max(r.metrics["value"] for r in results if r.metrics)


def main() -> None:
    with benchmark(
        "one_by_one", "cohorts against one Tune trial each, on cached features"
    ) as bench:
        num_images, trials = bench.size(NUM_IMAGES, 600), bench.size(TRIALS, 6)
        epochs = bench.size(30, 3)
        table, split = ours.random_table(num_images)
        space = ours.space_of(BACKBONE, trials=trials, epochs=epochs)
        console.print(
            f"{trials} trials of {epochs} epochs: linear heads on random features of "
            f"{BACKBONE}'s shape, {num_images:,} pictures, batches of 64"
        )
        with cluster("local") as workers:
            prepared = ours.prepare(bench, space, table, split, workers)
            features = ours.random_store(prepared, NUM_FEATURES)
            cohorts = ours.run(prepared, features, workers)
            (folder,) = features.values()
            singly, best = one_by_one(bench, prepared, Path(folder))
        rows = [
            {"how": how, "wall, s": seconds, "s a trial": seconds / trials,
             "trials an hour": 3600 * trials / seconds}
            for how, seconds in (("one Tune trial each", singly), ("cohorts", cohorts))
        ]  # fmt: skip
        show("the same trials, Ray running already", rows)
        bench.figures.update(rows=rows, ratio=singly / cohorts, best=[best, prepared.best])
        bench.figures["met"] = verdict(
            "times faster than one by one", figure=singly / cohorts, at_least=15
        )
        console.print(f"best validation value: {best:.4f} one by one, {prepared.best:.4f} cohorts")


if __name__ == "__main__":
    main()
