"""Bar 5: what logging a trial to MLflow costs, by store, and its share of a study's wall time.

The real `Tracker` writes trials of 30 epochs x 8 metrics. The share is measured: the same cohorts
train with and without a tracker that writes beside them, the wait for its last write included.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from measuring import (
    Bench,
    benchmark,
    console,
    random_features,
    random_targets,
    show,
    split_rows,
    verdict,
)

from core.config import TrialConfig
from core.probing.probe import train_probes
from core.report import Outcome, Status
from tests.servers import mlflow_server, postgres
from tuner.tracking.tracker import Tracker

EPOCHS, METRICS = 30, 8
SETTINGS = TrialConfig(backbone="mobilenet_v2", optimizer="adamw", weight_decay=1.0).to_dict()
COHORT = 32


@contextmanager
def tracking(bench: Bench, uri: str, study: str) -> Iterator[Tracker]:
    """A tracker whose study has started: making the store's tables is not counted."""
    tracker = Tracker(
        uri,
        experiment="bench",
        artifacts=bench.scratch / "artifacts",
        study=study,
        objective="top3_accuracy",
        floor=0.3,
    )
    try:
        tracker.start_study({"space": "bench"})
        tracker.flush()
        yield tracker
    finally:
        tracker.close()


def made_up(rng: random.Random) -> Outcome:
    curve = [{f"metric_{m}": rng.random() for m in range(METRICS)} for _ in range(EPOCHS)]
    return Outcome(
        status=Status.COMPLETE, curve=tuple(curve), best_epoch=9, best_value=0.5, seconds=1.0
    )


def log_trials(tracker: Tracker, outcomes: list[Outcome]) -> None:
    """As the searcher does: a cohort starts, a cohort ends. Returns when all is written."""
    for start in range(0, len(outcomes), COHORT):
        numbers = range(start, min(start + COHORT, len(outcomes)))
        for number in numbers:
            tracker.trial_started(number, SETTINGS)
        for number in numbers:
            tracker.trial_ended(number, SETTINGS, outcomes[number])
    tracker.flush()


def cost(bench: Bench, store: str, uri: str, num_trials: int) -> dict[str, Any]:
    rng = random.Random(0)
    outcomes = [made_up(rng) for _ in range(num_trials)]
    with tracking(bench, uri, "cost") as tracker:
        wall, cpu = time.perf_counter(), time.process_time()
        log_trials(tracker, outcomes)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "store": store,
        "trials": num_trials,
        "ms a trial": 1000 * wall / num_trials,
        "of it CPU here, ms": 1000 * cpu / num_trials,
        "1,000 trials, s": 1000 * wall / num_trials,
    }


def costs(bench: Bench) -> list[dict[str, Any]]:
    """One line a store; a store that cannot be had is named and left out."""
    rows = [
        cost(bench, "sqlite", f"sqlite:///{bench.scratch}/alone.db", bench.size(1000, 40)),
    ]
    servers = {"HTTP server on sqlite": False, "the same with job runner": True}
    for store, jobs in list(servers.items())[: bench.size(2, 1)]:
        database = f"sqlite:///{bench.scratch}/served-{jobs}.db"
        with mlflow_server(database, bench.scratch, jobs=jobs) as url:
            rows.append(cost(bench, store, url, bench.size(200, 20)))
    with ExitStack() as stack:
        database = stack.enter_context(postgres(bench.scratch))
        if database is None:
            console.print("no PostgreSQL here (initdb, psycopg2): left out")
            return rows
        rows.append(cost(bench, "PostgreSQL", database, bench.size(200, 20)))
        url = stack.enter_context(mlflow_server(database, bench.scratch))
        rows.append(cost(bench, "HTTP server on PostgreSQL", url, bench.size(200, 20)))
    return rows


def train(bench: Bench, tracker: Tracker | None) -> float:
    """Seconds until 1,000 linear heads on 1,280 features are trained, and logged if so asked.

    A process of its own trains, as in a study; this one logs.
    """
    job = {"num_images": bench.size(7254, 800), "size": bench.size(250, 20)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as worker:
        worker.submit(train_cohort, 0, {"num_images": 100, "size": 1}).result()
        started = time.perf_counter()
        cohorts = [worker.submit(train_cohort, n, job) for n in range(bench.size(4, 2))]
        for cohort in cohorts:
            for number, config, outcome in cohort.result() if tracker else ():
                tracker.trial_started(number, config)
                tracker.trial_ended(number, config, outcome)
        cohorts[-1].result()
        if tracker:
            tracker.flush()
        return time.perf_counter() - started


def train_cohort(cohort: int, job: dict[str, int]) -> list[tuple[int, dict[str, Any], Outcome]]:
    """Train one cohort of linear heads; numbers, settings and outcomes."""
    features = random_features(job["num_images"], 1280)
    targets = random_targets(job["num_images"])
    numbers = range(cohort * job["size"], (cohort + 1) * job["size"])
    configs = [
        TrialConfig.from_dict({**SETTINGS, "lr": 1e-4 * (1 + n % 50), "seed": n, "epochs": EPOCHS})
        for n in numbers
    ]
    outcomes = train_probes(features, targets, [split_rows(job["num_images"])], configs)
    return [
        (number, config.to_dict(), eight_metrics(outcome))
        for number, config, outcome in zip(numbers, configs, outcomes, strict=True)
    ]


def eight_metrics(outcome: Outcome) -> Outcome:
    """Its curve with METRICS metrics an epoch."""
    curve = []
    for metrics in outcome.curve:
        more = {f"metric_{m}": 0.5 for m in range(METRICS - len(metrics))}
        curve.append({**metrics, **more})
    return Outcome(
        status=outcome.status,
        curve=tuple(curve),
        best_epoch=outcome.best_epoch,
        best_value=outcome.best_value,
        best_metrics=outcome.best_metrics,
        seconds=outcome.seconds,
    )


def main() -> None:
    with benchmark("mlflow", f"trials of {EPOCHS} epochs x {METRICS} metrics") as bench:
        rows = costs(bench)
        show("cost of a trial in MLflow, nothing else running", rows)
        with tracking(bench, f"sqlite:///{bench.scratch}/share.db", "share") as tracker:
            alone, logged = train(bench, None), train(bench, tracker)
        share = 1 - alone / logged
        show(
            "training cohorts and logging their trials to sqlite",
            [{"training alone, s": alone, "with logging, s": logged, "share of logging": share}],
        )
        console.print(
            "Only training is in this share's denominator: a study also reads pictures, asks the "
            "sampler and trains finalists."
        )
        bench.figures.update(rows=rows, alone=alone, logged=logged, share=share)
        bench.figures["met"] = verdict("share of wall time", figure=share, at_most=0.1)


if __name__ == "__main__":
    main()
