"""A study as `tuner search` runs it, from features to the last outcome, for benchmarks to time.

The same functions as `tuner.search.run`, without checks before and finalists after. Paths of
pictures may lead nowhere where features are given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Bench, random_features, random_targets, split_rows, weights_at_hand
from rich.console import Console

from core.data.split import Split
from core.data.table import Table
from core.encoding.shards import SHARD_ROWS, ShardedMatrix
from core.precision import inference_precision
from tuner.features.extraction import extract
from tuner.home import Home, open_home
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.plan import Plan, make_plan
from tuner.studies.study import Study, StudyRecord, create_study, trial_records
from tuner.tracking.tracker import Tracker
from tuner.trials.channel import start_channel
from tuner.trials.cluster import Workers
from tuner.trials.context import Context, FeatureRequest
from tuner.trials.on_tune import run_trials
from tuner.views.live import StudyView

STUDY = "ours"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A study that can run its trials."""

    study: Study
    space: SearchSpace
    context: Context
    plan: Plan
    home: Home

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Settings of the trials that ran."""
        return [r.settings for r in trial_records(self.study.optuna(), self.space)]

    @property
    def best(self) -> float:
        return float(self.study.optuna().best_value)


def space_of(
    backbone: str, *, trials: int, epochs: int, batch_size: int = 64, sampler: str = "tpe"
) -> SearchSpace:
    """Linear heads as in the shipped space `probe`; no pruner, so that every trial is whole."""
    return parse_space(
        {
            "name": "bench",
            "trials": trials,
            "sampler": sampler,
            "pruner": "none",
            "parameters": {
                "backbone": backbone,
                "head": "linear",
                "loss": ["bce", "cross_entropy", "focal", "asymmetric"],
                "optimizer": ["adam", "adamw"],
                "lr": {"low": 3e-4, "high": 3e-2, "log": True},
                "weight_decay": {"low": 1e-4, "high": 0.3, "log": True},
                "label_smoothing": {"low": 0.0, "high": 0.3},
                "batch_size": batch_size,
                "epochs": epochs,
            },
        }
    )


def prepare(
    bench: Bench,
    space: SearchSpace,
    table: Table,
    split: Split,
    workers: Workers,
    *,
    seed: int = 0,
) -> Prepared:
    """A study's folder and context, in a home of its own."""
    home = open_home(bench.scratch / "home")
    weights, weights_dir, _ = weights_at_hand()
    record = StudyRecord(
        name=STUDY,
        space=space.to_dict(),
        data={"data": str(table.root)},
        skipped=(),
        fingerprint="",
        num_folds=None,
        seed=seed,
        trials=space.trials,
        storage=None,
        tracking_uri=f"sqlite:///{home.root / 'mlflow.db'}",
        model="bench",
        weights=weights,
        weights_dir=str(weights_dir) if weights_dir else None,
    )
    study = create_study(home, record)
    study.optuna(new=True)
    plan = make_plan(space, trials=space.trials, hours=None)
    context = Context(
        study=STUDY,
        table=table,
        split=split,
        pictures="bench",
        objective=space.objective,
        seed=seed,
        cache=home.cache,
        folder=study.folder,
        weights=weights,
        weights_dir=weights_dir,
        rungs=plan.rungs,
        precision=inference_precision("cuda" if workers.gpus else "cpu"),
        num_threads=workers.num_threads,
    )
    return Prepared(study=study, space=space, context=context, plan=plan, home=home)


def extract_features(prepared: Prepared, workers: Workers) -> dict[FeatureRequest, str]:
    """What `tuner search` does first: pictures decoded, features computed."""
    return extract(
        prepared.context,
        prepared.plan.requests,
        start_channel(),
        num_workers=workers.count,
        cpus_per_worker=workers.cpus,
        gpus_per_worker=workers.gpus,
        watch=lambda news: None,
    )


def run(prepared: Prepared, features: Mapping[FeatureRequest, str], workers: Workers) -> float:
    """Seconds until all trials ended and are in Optuna, the outcome log and MLflow, whose database
    is made meanwhile."""
    with _tracker(prepared) as tracker:
        view = StudyView(
            Console(file=StringIO()), prepared.space, budget=prepared.plan.trials, floor=0.0
        )
        started = time.perf_counter()
        done = run_trials(
            prepared.study,
            prepared.space,
            prepared.context,
            prepared.plan,
            workers,
            features=features,
            tracker=tracker,
            view=view,
        )
        assert done, "the study was interrupted"
        tracker.flush()
        return time.perf_counter() - started


@contextmanager
def _tracker(prepared: Prepared) -> Iterator[Tracker]:
    tracker = Tracker(
        prepared.study.record.tracking_uri,
        experiment="bench",
        artifacts=prepared.home.artifacts,
        study=STUDY,
        objective=prepared.space.objective,
        floor=0.0,
    )
    try:
        tracker.start_study({"space": "bench"})
        yield tracker
    finally:
        tracker.close()


def random_table(num_images: int) -> tuple[Table, Split]:
    """A table of pictures that do not exist, with its split."""
    targets_NC = random_targets(num_images).numpy().astype(np.uint8)
    ids = tuple(str(row) for row in range(num_images))
    table = Table(
        name="random",
        root=Path("/nowhere"),
        ids=ids,
        paths=tuple(Path("/nowhere") / f"{i}.jpg" for i in ids),
        targets_NC=targets_NC,
        class_names=tuple(f"class {c}" for c in range(targets_NC.shape[1])),
    )
    return table, split_of(num_images)


def split_of(num_images: int) -> Split:
    train, validation = split_rows(num_images)
    test = np.setdiff1d(np.arange(num_images), np.concatenate([train, validation]))
    return Split(seed=0, train=train, validation=validation, test=test)


def random_store(prepared: Prepared, num_features: int) -> dict[FeatureRequest, str]:
    """Features of the one request of a study, random, in a store as extraction leaves it."""
    (request,) = prepared.plan.requests
    num_images = prepared.context.table.num_images
    values = random_features(num_images, num_features)
    matrix = ShardedMatrix(
        prepared.context.cache / "features" / "random",
        spec={},
        num_rows=num_images,
        row_shape=(num_features,),
        dtype="float32",
    )
    for shard in range(matrix.num_shards):
        matrix.write_shard(shard, values[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS])
    return {request: str(matrix.folder)}
