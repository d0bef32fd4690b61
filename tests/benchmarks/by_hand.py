"""Searches of heads on cached features as a person writes them, for `bench_search_time.py`.

One head at a time, a module and torch.optim in a plain loop, features scaled once. *One by one*:
Optuna's ask and tell in this process, with all cores. *Ray*: OptunaSearch and ASHA with a trial a
core, reused actors, features in the object store, no loggers. A loss, a schedule and the metric are
looked up in `core`, so that everybody trains the same trials; the space is the same too. N
pictures, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from tuner.spaces.space import SearchSpace

Ends = list[tuple[float, float]]
"""(seconds since the search began, the best validation value of a trial that ended then)."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What every trial reads."""

    features: Mapping[str, np.ndarray]
    """By backbone, float32, scaled to the training rows' mean and spread."""
    targets_NC: np.ndarray
    train: np.ndarray
    validation: np.ndarray


def train_head(settings: Mapping[str, Any], data: Data) -> Iterator[float]:
    """The validation score after each epoch; it ends early if the head diverges."""
    from core.config import TrialConfig
    from core.head_settings import head_settings
    from core.heads import build_head
    from core.losses import LOSSES, class_weights
    from core.metrics import topk_recall
    from core.optimizers import OPTIMIZERS
    from core.schedules import rate_factors

    config = TrialConfig.from_dict(dict(settings))
    features_ND = torch.from_numpy(data.features[config.backbone])
    targets_NC = torch.from_numpy(data.targets_NC)
    num_features, num_classes = features_ND.shape[1], targets_NC.shape[1]
    head = build_head(num_features=num_features, num_classes=num_classes, **head_settings(config))
    rule, loss = OPTIMIZERS[config.optimizer], LOSSES[config.loss]
    optimizer = rule.build(
        [{"params": list(head.parameters())}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        **{key: getattr(config, key) for key in rule.parameters},
    )
    loss_settings = {key: getattr(config, key) for key in loss.parameters}
    loss_settings["class_weights_C"] = class_weights(config.class_weights, targets_NC[data.train])
    per_epoch = -(-len(data.train) // config.batch_size)
    factors = rate_factors(
        config.schedule,
        num_steps=config.epochs * per_epoch,
        warmup_fraction=config.warmup_fraction,
    )
    rng = np.random.default_rng(config.seed)
    validation_ND, true_NC = features_ND[data.validation], targets_NC[data.validation]
    step = 0
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(data.train))
        head.train()
        for rows in order.split(config.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factors[step]
            step += 1
            logits = head(features_ND[rows])
            mean = loss.function(
                logits, targets_NC[rows], label_smoothing=config.label_smoothing, **loss_settings
            ).mean()
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
        head.eval()
        with torch.no_grad():
            scores_NC = head(validation_ND)
        if not bool(torch.isfinite(scores_NC).all()):
            return
        yield float(topk_recall(scores_NC, true_NC))


def one_by_one(
    sampler: optuna.samplers.BaseSampler, space: SearchSpace, data: Data, *, seconds: float
) -> Ends:
    """Ask, train to the last epoch, tell, until the time is over."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    ends: Ends = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        trial = study.ask()
        value = max(train_head(space.suggest(trial) | {"seed": trial.number}, data), default=0.0)
        study.tell(trial, value)
        ends.append((time.perf_counter() - began, value))
    return ends


def define(space: SearchSpace, trial: optuna.Trial) -> None:
    """The space as OptunaSearch wants it: a function, which Tune can pickle."""
    space.suggest(trial)


def ray_trial(config: Mapping[str, Any], data: Data, space: SearchSpace) -> None:
    """A Tune trial: reports every epoch."""
    from ray import tune

    torch.set_num_threads(1)
    settings = space.from_params(config)
    best = 0.0
    for value in train_head(settings | {"seed": 0}, data):
        best = max(best, value)
        tune.report({"value": value, "best": best, "now": time.time()})
    if not best:
        tune.report({"value": 0.0, "best": 0.0, "now": time.time()})


def ray_search(
    space: SearchSpace,
    data: Data,
    folder: Path,
    *,
    seconds: float,
    seed: int,
    rungs: Sequence[int],
    workers: int,
) -> Ends:
    """OptunaSearch and ASHA, `workers` trials at a time, until the time is over."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    began = time.time()
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(ray_trial, data=data, space=space), {"cpu": 1}),
        tune_config=tune.TuneConfig(
            # A space that is a function wants the metric of the searcher itself.
            search_alg=OptunaSearch(
                space=partial(define, space), metric="value", mode="max", seed=seed
            ),
            scheduler=ASHAScheduler(
                metric="value",
                mode="max",
                max_t=space.max_epochs,
                grace_period=rungs[0],
                reduction_factor=3,
            ),
            num_samples=-1,
            max_concurrent_trials=workers,
            time_budget_s=seconds,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="by-hand", storage_path=str(folder), verbose=0),
    ).fit()
    if results.num_errors:
        raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
    # A trial that the end of the time cut off has reported, too.
    reports = [result.metrics for result in results if result.metrics]
    return sorted((r["now"] - began, r["best"]) for r in reports if "best" in r)
