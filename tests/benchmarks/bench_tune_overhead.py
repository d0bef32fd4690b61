"""Bookkeeping: trials that sleep 1 s, with our searcher, storage and tracking, beside bare Tune.

Ray's release test of Tune's bookkeeping (10,000 trials of 1 s on 16 CPUs within 800 s) scaled to
the cores there are. Bare: a function that sleeps and reports once, reused actors, no loggers, no
searcher. Ours is `tuner.trials.on_tune.run_trials` as it is (TPE, successive halving, journal file,
outcome log, a run a trial in MLflow on sqlite, the live table), with a worker that sleeps instead
of training, reports at a rung and waits for the ruling. Every trial is a cohort of its own: the
hardest case, as a cohort of many costs what one does. They take turns on one Ray.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import ours
from measuring import Bench, benchmark, console, show, verdict

from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.trials.channel import ChannelHandle
from tuner.trials.cluster import Workers, cluster
from tuner.trials.context import Context

SECONDS = 1.0
TRIALS = 200
EPOCHS = 9


def sleeping_space(trials: int) -> SearchSpace:
    """As many parameters as a small search has; each round, and so each cohort, is one trial."""
    return parse_space(
        {
            "name": "sleep",
            "cohort_size": 1,
            "trials": trials,
            "parameters": {
                "backbone": "squeezenet1_1",
                "optimizer": ["sgd", "adamw"],
                "lr": [
                    {"when": {"optimizer": "sgd"}, "low": 1e-3, "high": 1, "log": True},
                    {"low": 1e-5, "high": 1e-2, "log": True},
                ],
                "weight_decay": {"low": 1e-4, "high": 10, "log": True},
                "label_smoothing": {"low": 0.0, "high": 0.3},
                "batch_size": [32, 64],
                "epochs": EPOCHS,
            },
        }
    )


def sleep_cohort(job: Mapping[str, Any], context: Context, channel: ChannelHandle) -> None:
    """In the place of `tuner.trials.cohort.run_cohort`: the same reports and deliveries."""
    from ray import tune

    from core.report import Outcome, Status

    value = 0.5 - 0.1 * abs(job["trials"][0]["label_smoothing"] - 0.1)
    metrics = {"validation_top3_accuracy": value, "validation_loss": 0.3, "train_loss": 0.2}
    (rung, *_) = context.rungs
    time.sleep(SECONDS / 2)
    tune.report({"epoch": rung, "places": [0], "values": [value]})
    stops = channel.ruling(job["cohort"], rung)
    time.sleep(SECONDS / 2)
    epochs = rung if stops else EPOCHS
    outcome = Outcome(
        status=Status.PRUNED if stops else Status.COMPLETE,
        reason=f"pruned at epoch {rung}" if stops else "",
        curve=(metrics,) * epochs,
        best_epoch=1,
        best_value=value,
        seconds=SECONDS,
    )
    channel.deliver(job["cohort"], [outcome])
    tune.report({"epoch": 0, "places": [], "values": []})


def sleep_bare(config: Mapping[str, Any]) -> None:
    from ray import tune

    time.sleep(SECONDS)
    tune.report({"value": config["lr"]})


def bare(bench: Bench, trials: int, workers: Workers) -> float:
    from ray import tune

    started = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(sleep_bare, {"cpu": workers.cpus}),
        param_space={"lr": tune.loguniform(1e-5, 1e-2)},
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"bare-{time.time_ns()}", storage_path=str(bench.scratch / "tune"), verbose=0
        ),
    ).fit()
    assert results.num_errors == 0 and len(results) == trials
    return time.perf_counter() - started


def with_ours(bench: Bench, trials: int, workers: Workers) -> float:
    space = sleeping_space(trials)
    table, split = ours.random_table(64)
    prepared = ours.prepare(bench, space, table, split, workers)
    features = dict.fromkeys(prepared.plan.requests, str(bench.scratch))
    with patch("tuner.trials.on_tune.run_cohort", sleep_cohort):
        seconds = ours.run(prepared, features, workers)
    ended = prepared.study.optuna().get_trials(deepcopy=False)
    assert len(ended) == trials and all(trial.state.is_finished() for trial in ended)
    return seconds


def main() -> None:
    with benchmark("tune_overhead", "trials that sleep, with and without our bookkeeping") as bench:
        trials = bench.size(TRIALS, 8)
        with cluster("local") as workers:
            cores = round(workers.count * workers.cpus)
            workers = dataclasses.replace(workers, count=cores, cpus=1.0)
            ideal = SECONDS * trials / workers.count
            console.print(f"{trials} trials of {SECONDS:g} s, {workers.count} at a time")
            bare(bench, 2 * workers.count, workers)  # Actors and imports: not counted.
            seconds = {"bare Tune": bare(bench, trials, workers)}
            seconds["ours"] = with_ours(bench, trials, workers)
        rows = [
            {"how": how, "wall, s": wall, "over sleeping alone, s": wall - ideal,
             "over it a trial, ms": 1000 * (wall - ideal) / trials}
            for how, wall in seconds.items()
        ]  # fmt: skip
        show("the same number of trials on one Ray", rows)
        bench.figures.update(rows=rows, trials=trials)
        bench.figures["met"] = verdict(
            "ours over bare Tune", figure=seconds["ours"] / seconds["bare Tune"], at_most=1.15
        )


if __name__ == "__main__":
    main()
