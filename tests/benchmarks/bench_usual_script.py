"""Bar 1: `tuner search` against the script that everybody writes (`usual.py`).

The script is run on as much as time allows, and the rest is extrapolated: a trial costs what Tune
and the start of an actor cost, and then the same for every picture of every epoch. Ours is run
whole: extraction, 64 trials, MLflow.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import ours
import torch
import usual
from measuring import Bench, benchmark, console, poster_table, show, verdict, weights_at_hand

from core.config import TrialConfig
from core.models.intervals import bootstrap_interval
from core.probing.probe import train_probes
from tuner.trials.cluster import cluster
from tuner.trials.cohort import open_matrix

BACKBONE, SIZE = "squeezenet1_1", 224
TRIALS, EPOCHS = 64, 30
"""Of the comparison; the script is not run in this length."""


def script_job(table: Any, split: Any, num_images: int) -> usual.Job:
    """The script on the first so many training rows, and validation rows in proportion."""
    _, weights_dir, _ = weights_at_hand()
    share = num_images / table.num_images
    return usual.Job(
        backbone=BACKBONE,
        weights=weights_dir / f"{BACKBONE}.pth" if weights_dir else None,
        paths=[str(path) for path in table.paths],
        targets_NC=table.targets_NC,
        train=split.train[: round(len(split.train) * share)],
        validation=split.validation[: max(2, round(len(split.validation) * share))],
        size=SIZE,
    )


def time_script(bench: Bench, table: Any, split: Any, cores: int) -> dict[str, Any]:
    """Cost of a trial at full length, from one trial a core on a part of the pictures."""
    num_images, epochs = bench.size(256, 40), 2
    job = script_job(table, split, num_images)
    wall, results = usual.search(job, bench.scratch / "usual", trials=cores, epochs=epochs)
    seen = len(job.train) + len(job.validation)
    # Of the second epoch: the first also warms caches.
    epoch = float(np.mean([result.metrics["epoch_s"] for result in results]))
    per_picture = epoch / seen
    fixed = max(0.0, wall - epochs * epoch)
    full = len(split.train) + len(split.validation)
    trial = fixed + EPOCHS * full * per_picture
    console.print(
        f"the script: {cores} trials at once (one a core) x {epochs} epochs x {seen} pictures took "
        f"{wall:.1f} s: {1000 * per_picture:.1f} ms a picture and epoch, and {fixed:.1f} s that no "
        f"epoch spent (Tune, start of an actor, loading).\n"
        f"extrapolated: {EPOCHS} epochs x {full:,} pictures = {trial:,.0f} s a trial, "
        f"{TRIALS} trials, {cores} at once"
    )
    return {"measured_s": wall, "ms_a_picture": 1000 * per_picture, "fixed_s": fixed,
            "trial_s": trial, "all_s": trial * TRIALS / cores}  # fmt: skip


def time_ours(bench: Bench, table: Any, split: Any, workers: Any) -> tuple[dict[str, Any], Path]:
    space = ours.space_of(BACKBONE, trials=bench.size(TRIALS, 6), epochs=bench.size(EPOCHS, 2))
    prepared = ours.prepare(bench, space, table, split, workers)
    started = time.perf_counter()
    features = ours.extract_features(prepared, workers)
    extraction = time.perf_counter() - started
    trials = ours.run(prepared, features, workers)
    return (
        {"extraction_s": extraction, "trials_s": trials, "all_s": extraction + trials},
        Path(next(iter(features.values()))),
    )


def same_score(bench: Bench, table: Any, split: Any, features: Path) -> dict[str, Any]:
    """One identical configuration both ways: best validation score, and its 95 % interval."""
    epochs = bench.size(8, 2)
    settings = {"lr": 3e-3, "weight_decay": 0.01, "batch_size": 64}
    job = script_job(table, split, bench.size(500, 40))
    _, (result,) = usual.search(
        job, bench.scratch / "same", trials=1, epochs=epochs, fixed=settings
    )
    theirs = float(result.metrics["best"])
    config = TrialConfig(
        backbone=BACKBONE, feature_norm="none", optimizer="adamw", epochs=epochs, **settings
    )
    matrix, targets = open_matrix(str(features)), torch.from_numpy(table.targets_NC).float()
    (outcome,) = train_probes(
        matrix, targets, [(job.train, job.validation)], [config], keep_state=True
    )
    assert outcome.state is not None and outcome.best_value is not None
    weight_CD, bias_C = outcome.state["layers.0.weight"], outcome.state["layers.0.bias"]
    logits_NC = torch.from_numpy(np.array(matrix[job.validation])) @ weight_CD.T + bias_C
    true_NC = targets[job.validation]
    predicted_NC = torch.zeros_like(true_NC).scatter_(1, logits_NC.topk(3).indices, 1)
    hits_N, labels_N = (predicted_NC * true_NC).sum(1), true_NC.sum(1)
    interval = bootstrap_interval(hits_N.numpy(), labels_N.numpy())
    return {
        "epochs": epochs, "training pictures": len(job.train), "script": theirs,
        "ours": outcome.best_value, "95 % from": interval.low, "to": interval.high,
        "within": str(interval.low <= theirs <= interval.high),
    }  # fmt: skip


def main() -> None:
    with benchmark(
        "usual_script", "tuner search against Tune + OptunaSearch + DataLoader"
    ) as bench:
        num_images = bench.size(2000, 100)
        table, what = poster_table(bench, num_images)
        split = ours.split_of(num_images)
        _, _, weights = weights_at_hand()
        console.print(f"{BACKBONE} on {what}, {weights}")
        with cluster("local") as workers:
            mine, features = time_ours(bench, table, split, workers)
            script = time_script(bench, table, split, max(1, int(workers.cpus)))
            same = same_score(bench, table, split, features)
        ratio = script["all_s"] / mine["all_s"]
        rows = [
            {"how": how, f"{TRIALS} trials, s": seconds, "trials an hour": 3600 * TRIALS / seconds}
            for how, seconds in (("usual script (extrapolated)", script["all_s"]),
                                 ("tuner search, extraction included", mine["all_s"]),
                                 ("the same, features there already", mine["trials_s"]))
        ]  # fmt: skip
        show(f"{TRIALS} trials of {EPOCHS} epochs on {num_images:,} pictures", rows)
        show("one identical configuration both ways: best validation top3_accuracy", [same])
        bench.figures.update(script=script, ours=mine, ratio=ratio, same=same, data=what)
        bench.figures["met"] = verdict("times the trials an hour", figure=ratio, at_least=300)


if __name__ == "__main__":
    main()
