"""What a fine-tuning trial of two workers costs beyond its training: ours against Ray's own way.

Ray's own way is a `TorchTrainer` in a Tune trial, everything at its defaults. Both train the same
model on the same pictures of noise for one epoch, so what lies between one trial's last step and
the next one's first is the cost of a trial. The first trial also starts what the others find.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import ours
from measuring import Bench, benchmark, console, show, verdict
from rich.console import Console

from core.report import Outcome
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.trials.cluster import DRIVER_VARIABLES, Share, cluster
from tuner.trials.on_tune import run_trials
from tuner.views.live import StudyView

WORKERS = 2
BACKBONE, SIZE = "squeezenet1_1", 64
NUM_IMAGES = 400
SETTINGS = {
    "backbone": BACKBONE, "image_size": SIZE, "unfrozen_stages": 1, "batch_size": 64, "epochs": 1,
}  # fmt: skip


class Times:
    """A view that notes when trials start, report their one epoch, and end."""

    def __init__(self, view: StudyView) -> None:
        self._view = view
        self.trials: list[dict[str, float]] = []

    @contextmanager
    def showing(self, earlier: Sequence[Any] = ()) -> Iterator[None]:
        with self._view.showing(earlier=earlier):
            yield

    def trial_started(self, number: int, settings: Mapping[str, Any]) -> None:
        self.trials.append({"started": time.time()})

    def cohort_progress(
        self, numbers: Sequence[int], epoch: int, values: Mapping[int, float]
    ) -> None:
        self.trials[-1]["trained"] = time.time()

    def trial_ended(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        assert outcome.status == "complete", outcome.reason
        trial = self.trials[-1]
        trial["ended"] = time.time()
        trial["first_step"] = trial["trained"] - outcome.seconds


def space_of(trials: int) -> SearchSpace:
    return parse_space(
        {
            "name": "overhead", "mode": "finetune", "trials": trials, "cohort_size": 1,
            "sampler": "random", "pruner": "none",
            "parameters": {**SETTINGS, "lr": {"low": 1e-4, "high": 1e-3, "log": True}},
        }
    )  # fmt: skip


def run_ours(bench: Bench, trials: int) -> list[dict[str, float]]:
    """Seconds of each part of the way from a trial's last step to the next one's first."""
    space = space_of(trials)
    table, split = ours.random_table(NUM_IMAGES)
    with cluster("local") as workers:
        prepared = ours.prepare(bench, space, table, split, workers)
        (request,) = prepared.plan.requests
        features = {request: str(noise(bench))}
        view = Times(StudyView(Console(file=StringIO()), space, budget=trials, floor=0.0))
        began = time.time()
        with ours._tracker(prepared) as tracker:
            done = run_trials(
                prepared.study, space, prepared.context, prepared.plan, workers,
                features=features, tracker=tracker, view=view,  # type: ignore[arg-type]
                share=Share(workers=WORKERS),
            )  # fmt: skip
    assert done, "the study was interrupted"
    before = {"trained": began, "ended": began}
    rows = []
    for trial in view.trials:
        rows.append(
            {
                "last step to told": before["ended"] - before["trained"],
                "told to next start": trial["started"] - before["ended"],
                "start to first step": trial["first_step"] - trial["started"],
                "all": trial["first_step"] - before["trained"],
            }
        )
        before = trial
    return rows


def noise(bench: Bench) -> Path:
    """Decoded pictures as the cache holds them."""
    folder = bench.scratch / "noise"
    folder.mkdir(exist_ok=True)
    pictures = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIZE, SIZE, 3), np.uint8)
    np.save(folder / "matrix.npy", pictures)
    return folder


def training_loop(job: Mapping[str, Any]) -> None:
    """What a person would write as the loop of a TorchTrainer, with our training inside."""
    entered = time.time()
    import torch
    from ray import train

    from core.config import TrialConfig
    from core.encoding.encoders import build_encoder
    from core.finetuning.finetune import finetune
    from core.finetuning.ranks import joined_ranks

    torch.set_num_threads(1)
    config = TrialConfig.from_dict(job["settings"])
    outcome = finetune(
        build_encoder(config.backbone, weights="none", input_size=config.image_size, seed=0),
        np.load(Path(job["pictures"]) / "matrix.npy", mmap_mode="r"),
        torch.from_numpy(job["targets_NC"]).float(),
        job["train"],
        job["validation"],
        config,
        report=lambda epoch, metrics: False,
        ranks=joined_ranks(),
    )
    trained = time.time()
    times = {"entered": entered, "first_step": trained - outcome.seconds, "trained": trained}
    if train.get_context().get_world_rank() == 0:
        (Path(job["pictures"]) / f"times-{job['trial']}.json").write_text(json.dumps(times))
    train.report({"value": outcome.best_value})


def rays_trial(job: Mapping[str, Any]) -> None:
    """A Tune trial that runs a TorchTrainer."""
    started = time.time()
    from ray import tune
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        training_loop,
        train_loop_config=dict(job),
        scaling_config=ScalingConfig(num_workers=WORKERS),
    )
    trainer.fit()
    times = json.loads((Path(job["pictures"]) / f"times-{job['trial']}.json").read_text())
    tune.report({**times, "started": started, "ended": time.time()})


def run_rays(bench: Bench, trials: int) -> list[dict[str, float]]:
    """The same of Ray's own way, one trial after the other."""
    import ray
    from ray import tune

    table, split = ours.random_table(NUM_IMAGES)
    job = {
        "settings": {"mode": "finetune", **SETTINGS, "lr": 1e-3},
        "pictures": str(noise(bench)),
        "targets_NC": table.targets_NC,
        "train": split.train,
        "validation": split.validation,
        "trial": tune.grid_search(list(range(trials))),
    }
    for variable in DRIVER_VARIABLES:  # Ray's own defaults, not what we set for ours.
        os.environ.pop(variable, None)
    # A CPU for the Tune trial beside those of its workers, or it would wait for ever.
    ray.init(num_cpus=WORKERS + 1, log_to_driver=False)
    try:
        began = time.time()
        results = tune.Tuner(
            rays_trial,
            param_space=job,
            # One at a time: two that hold their CPUs would wait for each other's workers.
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(bench.scratch / "rays"), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    if results.num_errors:
        raise RuntimeError(f"trials failed: {results.errors[0]}")
    before = {"trained": began, "ended": began}
    rows = []
    for trial in sorted((r.metrics for r in results if r.metrics), key=lambda m: m["started"]):
        rows.append(
            {
                "last step to end of fit()": before["ended"] - before["trained"],
                "to next trial's first line": trial["started"] - before["ended"],
                "to its workers' first line": trial["entered"] - trial["started"],
                "to first step": trial["first_step"] - trial["entered"],
                "all": trial["first_step"] - before["trained"],
            }
        )
        before = trial
    return rows


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all trials but the first."""
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}


def main() -> None:
    with benchmark(
        "finetune_overhead", f"a fine-tuning trial of {WORKERS} workers beyond its training"
    ) as bench:
        trials = bench.size(6, 3)
        found = {"ours": run_ours(bench, trials), "Ray": run_rays(bench, bench.size(4, 2))}
        for name, rows in found.items():
            show(
                f"{name}: seconds, the first trial and the median of the others",
                [{"step": key, "first": rows[0][key], "further": value}
                 for key, value in medians(rows).items()],
            )  # fmt: skip
        further = {name: medians(rows)["all"] for name, rows in found.items()}
        share = further["ours"] / further["Ray"]
        console.print(
            f"{further['ours']:.2f} s a trial against {further['Ray']:.1f} s of Ray's defaults; "
            f"the first trial {found['ours'][0]['all']:.1f} s against "
            f"{found['Ray'][0]['all']:.1f} s"
        )
        bench.figures.update(rows=found, further=further, share=share)
        bench.figures["met"] = verdict("share of Ray's own overhead", figure=share, at_most=0.5)


if __name__ == "__main__":
    main()
