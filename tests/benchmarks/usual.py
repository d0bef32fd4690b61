"""The usual script: what everybody writes after reading Ray's documentation.

A Tune function trial an actor, OptunaSearch, a frozen torchvision backbone that sees every picture
in every epoch, a DataLoader that decodes it, MLflowLoggerCallback. Nothing of ours but the names
of weight files: `tuner` and `core` are not imported here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all trials of a script share."""

    backbone: str
    weights: Path | None
    """A state dict; None: random weights."""
    paths: Sequence[str]
    targets_NC: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    size: int
    """Side of the pictures in pixels."""


class Posters(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, job: Job, rows: np.ndarray) -> None:
        self.job, self.rows = job, rows
        self.transform = v2.Compose(
            [
                v2.Resize(
                    (job.size, job.size),
                    interpolation=v2.InterpolationMode.BICUBIC,
                    antialias=True,
                ),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[place]
        with Image.open(self.job.paths[row]) as image:
            picture = self.transform(image.convert("RGB"))
        return picture, torch.from_numpy(self.job.targets_NC[row]).float()


def frozen_backbone(job: Job) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(job.backbone, weights=None)
    if job.weights is not None:
        model.load_state_dict(torch.load(job.weights, weights_only=True), strict=False)
    features = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return features.eval().requires_grad_(False)


def top3_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    predicted = torch.zeros_like(targets).scatter_(1, logits.topk(3).indices, 1)
    return float((predicted * targets).sum() / targets.sum())


def train(config: Mapping[str, Any], job: Job) -> None:
    """One trial; reports the validation score and its own times every epoch."""
    from ray import tune

    started = time.perf_counter()
    backbone = frozen_backbone(job)
    with torch.no_grad():
        width = backbone(torch.zeros(1, 3, job.size, job.size)).shape[1]
    torch.manual_seed(config["seed"])
    head = nn.Linear(width, job.targets_NC.shape[1])
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
    )
    loader = torch.utils.data.DataLoader(
        Posters(job, job.train), batch_size=config["batch_size"], shuffle=True
    )
    validation = torch.utils.data.DataLoader(Posters(job, job.validation), batch_size=64)
    ready = time.perf_counter() - started
    best = 0.0
    for _ in range(config["epochs"]):
        started = time.perf_counter()
        for pictures, targets in loader:
            with torch.no_grad():
                features = backbone(pictures)
            loss = nn.functional.binary_cross_entropy_with_logits(head(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scored = [(head(backbone(pictures)), targets) for pictures, targets in validation]
        logits, targets = (torch.cat(part) for part in zip(*scored, strict=True))
        score = top3_accuracy(logits, targets)
        best = max(best, score)
        tune.report(
            {
                "top3_accuracy": score,
                "best": best,
                "loss": float(loss),
                "ready_s": ready,
                "epoch_s": time.perf_counter() - started,
            }
        )


def search(
    job: Job, folder: Path, *, trials: int, epochs: int, fixed: Mapping[str, Any] | None = None
) -> tuple[float, list[Any]]:
    """Run trials, one a core; returns the wall time and Tune's results. With `fixed` values of
    all that would be searched there is nothing for Optuna to do."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    space = {
        "lr": tune.loguniform(3e-4, 3e-2),
        "weight_decay": tune.loguniform(1e-4, 0.3),
        "batch_size": 64,
        "epochs": epochs,
        "seed": 0,
        **(fixed or {}),
    }
    os.makedirs(folder, exist_ok=True)
    started = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(train, job=job), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="top3_accuracy",
            mode="max",
            search_alg=None if fixed else OptunaSearch(),
            num_samples=trials,
        ),
        run_config=tune.RunConfig(
            name="usual",
            storage_path=str(folder),
            verbose=0,
            callbacks=[
                MLflowLoggerCallback(
                    tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="usual"
                )
            ],
        ),
    ).fit()
    if results.num_errors:
        raise RuntimeError(f"trials failed: {results.errors[0]}")
    return time.perf_counter() - started, list(results)
