"""Bar 2: cohorts against one Tune trial each on the same cached features.

Two baselines, both with features scaled once and shared through Ray's object store, reused actors,
one trial a core. *Bare*: one metric an epoch, no logger at all. *Tracked*: what ours delivers, too:
the same metrics of every epoch, and MLflow by Ray's own MLflowLoggerCallback. Neither asks a
sampler. Ours asks, trains cohorts and writes journal, outcome log and MLflow: in the rounds of TPE,
which learns and so asks for few trials at a time, and in whole rounds, as with a sampler that does
not learn. Both baselines train the very same trials as the former. A longer study of ours shows
what is left when starting has been paid for; it is set against the baselines' time a trial.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ours
from measuring import NUM_IMAGES, Bench, benchmark, console, show, verdict

from tuner.trials.cluster import cluster

BACKBONE, NUM_FEATURES = "squeezenet1_1", 512
TRIALS = 64
LONG = 256
"""Trials of a longer study, in which what starting takes is a smaller part."""
ROUNDS = {"random": "cohorts, whole rounds", "tpe": "cohorts, rounds of TPE"}
BARE, TRACKED = "one Tune trial each, bare", "one Tune trial each, tracked"


def one_trial(
    job: Mapping[str, Any], features: Any, targets: Any, split: Any, tracked: bool
) -> None:
    """Train one head with torch's own optimizer; report every epoch: the validation score, or
    with `tracked` all that ours reports."""
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
    sample = split["train"][:: max(1, len(split["train"]) // len(split["validation"]))]
    rng = np.random.default_rng(config.seed)

    def loss_of(logits: Any, rows: Any) -> Any:
        return loss.function(
            logits, targets_NC[rows], label_smoothing=config.label_smoothing, **settings
        )

    def score(rows: Any) -> tuple[float, float]:
        with torch.no_grad():
            logits = head(features_ND[rows])
            mean = float(loss_of(logits, rows).mean()) if tracked else 0.0
            return mean, float(topk_recall(logits, targets_NC[rows]))

    best = 0.0
    for epoch in range(config.epochs):
        order, total = rng.permutation(split["train"]), 0.0
        for start in range(0, len(order), config.batch_size):
            rows = torch.from_numpy(order[start : start + config.batch_size])
            mean = loss_of(head(features_ND[rows]), rows).mean()
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            if tracked:
                total += float(mean.detach()) * len(rows)
        validation_loss, value = score(torch.from_numpy(split["validation"]))
        best = max(best, value)
        report = {"epoch": epoch + 1, "value": value, "best": best}
        if tracked:
            report |= {
                "train_loss": total / len(order),
                "train_top3_accuracy": score(torch.from_numpy(sample))[1],
                "validation_loss": validation_loss,
                "lr": config.lr,
            }
        tune.report(report)


def one_by_one(
    bench: Bench,
    prepared: ours.Prepared,
    features: Path,
    trials: Sequence[Mapping[str, Any]],
    *,
    tracked: bool,
) -> tuple[float, float]:
    """Seconds of these trials, each a Tune trial, and the best value."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    matrix = np.load(features / "matrix.npy")
    split = prepared.context.split
    train_ND = matrix[split.train]
    scaled = (matrix - train_ND.mean(0)) / np.maximum(train_ND.std(0), 1e-6)
    trainable = tune.with_parameters(
        one_trial,
        features=scaled,
        targets=prepared.context.table.targets_NC.astype(np.float32),
        split={"train": split.train, "validation": split.validation},
        tracked=tracked,
    )
    name = "tracked" if tracked else "bare"
    store = f"sqlite:///{bench.scratch / name}.db"
    started = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(reuse_actors=True, metric="value", mode="max"),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(bench.scratch / "tune"),
            verbose=0,
            callbacks=[MLflowLoggerCallback(tracking_uri=store, experiment_name=name)]
            if tracked
            else [],
        ),
    ).fit()
    seconds = time.perf_counter() - started
    if results.num_errors:
        raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
    return seconds, max(r.metrics["best"] for r in results if r.metrics)


def main() -> None:
    with benchmark(
        "one_by_one", "cohorts against one Tune trial each, on cached features"
    ) as bench:
        num_images, trials = bench.size(NUM_IMAGES, 600), bench.size(TRIALS, 6)
        epochs, long = bench.size(30, 3), bench.size(LONG, 12)
        table, split = ours.random_table(num_images)
        console.print(
            f"{epochs} epochs a trial: linear heads on random features of {BACKBONE}'s shape, "
            f"{num_images:,} pictures, batches of 64"
        )
        seconds: dict[tuple[str, int], float] = {}
        with cluster("local") as workers:
            for sampler, count in product(("random", "tpe"), (long, trials)):
                space = ours.space_of(BACKBONE, trials=count, epochs=epochs, sampler=sampler)
                own = dataclasses.replace(bench, scratch=bench.scratch / f"{sampler}-{count}")
                prepared = ours.prepare(own, space, table, split, workers)
                features = ours.random_store(prepared, NUM_FEATURES)
                seconds[ROUNDS[sampler], count] = ours.run(prepared, features, workers)
            (folder,) = features.values()
            for how in (BARE, TRACKED):
                seconds[how, trials], best = one_by_one(
                    bench, prepared, Path(folder), prepared.trials, tracked=how == TRACKED
                )
        each = {key: wall / key[1] for key, wall in seconds.items()}
        rows = [
            {"how": how, "trials": count, "wall, s": wall, "s a trial": each[how, count],
             "times tracked": each[TRACKED, trials] / each[how, count],
             "times bare": each[BARE, trials] / each[how, count]}
            for (how, count), wall in seconds.items()
        ]  # fmt: skip
        show("the same trials, Ray running already", rows)
        bench.figures.update(rows=rows, best=[best, prepared.best])
        for how, baseline in product(ROUNDS.values(), (TRACKED, BARE)):
            bench.figures[f"met, {how}, {baseline}"] = verdict(
                f"{how}, {trials} trials: times faster than {baseline}",
                figure=each[baseline, trials] / each[how, trials],
                at_least=15,
            )
        console.print(f"best validation value: {best:.4f} one by one, {prepared.best:.4f} cohorts")


if __name__ == "__main__":
    main()
