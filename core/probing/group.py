"""Heads that train in one stack, epoch by epoch: one stack a fold, their curves and their ends.

A group lives in one thread at a time, of this process or of a helper's (`hosts`). N pictures,
H heads, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.inputs import FloatMatrix, HeadInputs, Rows
from ..metrics import (
    f1,
    macro_recall,
    mean_average_precision,
    topk_recall,
    worst_class_recall,
)
from ..report import Metrics, Outcome, Status
from .stack import HeadStack

METRICS: dict[str, Callable[..., Tensor]] = {
    "top3_accuracy": topk_recall,
    "mean_average_precision": mean_average_precision,
}
"""Objectives: (scores [H, N, C], targets [N, C], allow_nan) -> [H]; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all groups of a call share: see `train_probes`."""

    targets_NC: Tensor
    folds: Sequence[tuple[Rows, Rows]]
    objective: str
    order_seed: int
    precision: str
    last_epoch: int | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Trials that share a stack."""

    configs: dict[int, TrialConfig]
    """By place."""
    views: tuple[int, ...]
    """That they draw from: 0 is the plain one, then those of `Sources.further_views`."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The features that groups read: see `train_probes`."""

    features: FloatMatrix
    further_views: tuple[FloatMatrix, ...] = ()


def build_groups(
    parts: Sequence[Part], sources: Sources, task: Task, device: torch.device | str
) -> list[Group]:
    """The groups of some parts; what they read is scaled once for all that scale alike."""
    inputs: dict[str, list[HeadInputs]] = {}
    groups = []
    for part in parts:
        norm = next(iter(part.configs.values())).feature_norm
        if norm not in inputs:
            inputs[norm] = [
                HeadInputs(
                    sources.features,
                    norm=norm,
                    train_rows=train,
                    device=device,
                    further_views=sources.further_views,
                )
                for train, _ in task.folds
            ]
        groups.append(Group(part, inputs[norm], task))
    return groups


class Group:
    """Trials that share a stack (one stack a fold): their heads, curves and ends."""

    def __init__(
        self,
        part: Part,
        inputs: Sequence[HeadInputs],
        task: Task,
    ) -> None:
        configs, views = part.configs, part.views
        self.configs = configs
        self.task = task
        self.curves: dict[int, list[dict[str, float]]] = {place: [] for place in configs}
        self.best: dict[int, tuple[float, int]] = {}
        self.seconds: dict[int, float] = dict.fromkeys(configs, 0.0)
        self.diverged: dict[int, str] = {}
        self._ended: dict[int, Outcome] = {}
        self.folds = [
            Fold(list(configs.values()), fold_inputs, train, validation, np.array(views), task)
            for fold_inputs, (train, validation) in zip(inputs, task.folds, strict=True)
        ]
        self._places = list(configs)

    @property
    def running(self) -> list[int]:
        """Places of the trials still in the stack, in stack order."""
        return [self._places[m] for m in self.folds[0].stack.members]

    def train_epoch(self, *, epoch: int) -> dict[int, Metrics]:
        """One pass over the training rows and one look at the validation rows; the metrics of
        the trials that did not diverge, by place."""
        running = self.running
        if not running:
            return {}
        started = time.perf_counter()
        folds = [fold.train_epoch(epoch) for fold in self.folds]
        share = (time.perf_counter() - started) / len(running)
        latest: dict[int, Metrics] = {}
        improved = []
        for stack_place, place in enumerate(running):
            self.seconds[place] += share
            metrics = {
                name: float(np.mean([fold[name][stack_place] for fold in folds]))
                for name in folds[0]
            }
            if len(folds) > 1:
                name = f"validation_{self.task.objective}"
                by_fold = [fold[name][stack_place] for fold in folds]
                metrics |= {f"{name}_fold_{k}": value for k, value in enumerate(by_fold, 1)}
            wrong = [f"{name} is {v}" for name, v in metrics.items() if not np.isfinite(v)]
            if wrong:
                self.diverged[place] = f"diverged in epoch {epoch}: {', '.join(wrong)}"
                continue
            self.curves[place].append(metrics)
            latest[place] = metrics
            value = metrics[f"validation_{self.task.objective}"]
            newest = self.task.last_epoch is not None
            if newest or place not in self.best or value > self.best[place][0]:
                self.best[place] = (value, epoch)
                improved.append(stack_place)
        for fold in self.folds:
            fold.stack.remember(improved)
        return latest

    def let_leave(
        self, *, epoch: int, stops: frozenset[int], keep_state: bool
    ) -> dict[int, Outcome]:
        """End the trials that are done, stopped or diverged, and take their heads out; what they
        came to, by place."""
        stay, complete = [], []
        for stack_place, place in enumerate(self.running):
            if place in self.diverged:
                self._end(place, Status.FAILED, self.diverged[place])
            elif epoch in (self.configs[place].epochs, self.task.last_epoch):
                complete.append((stack_place, place))
            elif place in stops:
                self._end(place, Status.PRUNED, f"pruned at epoch {epoch}")
            else:
                stay.append(stack_place)
        if complete:
            further = self._further_metrics([stack_place for stack_place, _ in complete])
            for (stack_place, place), metrics in zip(complete, further, strict=True):
                state = self.folds[0].stack.best_state(stack_place) if keep_state else None
                self._end(place, Status.COMPLETE, "", metrics, state)
        if len(stay) < len(self.running):
            for fold in self.folds:
                fold.stack.keep(stay)
        ended, self._ended = self._ended, {}
        return ended

    def _further_metrics(self, stack_places: list[int]) -> list[dict[str, float]]:
        folds = [fold.further_metrics(stack_places) for fold in self.folds]
        return [
            {
                name: float(np.mean([fold[i][name] for fold in folds]))
                for name in folds[0][i]
                if all(name in fold[i] for fold in folds)
            }
            for i in range(len(stack_places))
        ]

    def _end(
        self,
        place: int,
        status: Status,
        reason: str,
        metrics: dict[str, float] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        value, epoch = self.best.get(place, (None, None))
        self._ended[place] = Outcome(
            status=status,
            reason=reason,
            curve=tuple(self.curves[place]),
            best_epoch=epoch,
            best_value=value,
            best_metrics=metrics or {},
            seconds=self.seconds[place],
            state=state,
        )


class Fold:
    """One stack on one fold's rows."""

    def __init__(
        self,
        configs: Sequence[TrialConfig],
        inputs: HeadInputs,
        train: Rows,
        validation: Rows,
        views: Rows,
        task: Task,
    ) -> None:
        self.inputs = inputs
        self.targets_NC = task.targets_NC.to(inputs.device)
        self.train = train
        self.validation = validation
        self.views = views
        self.batch_size = configs[0].batch_size
        self.objective = task.objective
        self.order_seed = task.order_seed
        # As many training as validation rows, spread evenly: a training accuracy at little cost.
        step = max(1, len(train) // len(validation))
        self.train_sample = train[::step][: len(validation)]
        self.stack = HeadStack(
            configs,
            num_features=inputs.num_features,
            train_targets_NC=task.targets_NC[torch.from_numpy(train)],
            steps_per_epoch=-(-len(train) // self.batch_size),
            device=inputs.device,
            precision=task.precision,
        )

    def train_epoch(self, epoch: int) -> dict[str, list[float]]:
        """Metrics of the epoch: name -> one value a head, in stack order; may be NaN."""
        # Of the study's seed, not of the trials': the same whoever is in the stack.
        chance = np.random.default_rng([self.order_seed, epoch])
        order = chance.permutation(self.train)
        views = self.views[chance.integers(len(self.views), size=len(order))]
        total_H = torch.zeros(len(self.stack), dtype=torch.float64, device=self.inputs.device)
        for start in range(0, len(order), self.batch_size):
            batch = slice(start, start + self.batch_size)
            rows = order[batch]
            features = self.inputs.batch(rows, views[batch] if len(self.views) > 1 else None)
            losses_H = self.stack.step(features, self._targets(rows))
            total_H += losses_H * len(rows)
        return {
            "train_loss": (total_H / len(order)).tolist(),
            **self._evaluate(self.train_sample, "train", ["top3_accuracy"]),
            **self._evaluate(
                self.validation,
                "validation",
                list(dict.fromkeys(("top3_accuracy", self.objective))),
            ),
            "lr": [self.stack.rate(place) for place in range(len(self.stack))],
        }

    def _targets(self, rows: Rows) -> Tensor:
        return self.targets_NC[torch.from_numpy(rows).to(self.inputs.device)]

    @torch.no_grad()
    def _evaluate(self, rows: Rows, part: str, names: Sequence[str]) -> dict[str, list[float]]:
        targets_NC = self._targets(rows)
        logits_NHC = self._over_blocks(rows, self.stack.logits)
        values: dict[str, list[float]] = {}
        if part == "validation":
            values["validation_loss"] = self.stack.losses(logits_NHC, targets_NC).mean(0).tolist()
        logits_HNC = logits_NHC.transpose(0, 1)
        for name in names:
            value_H = METRICS[name](logits_HNC, targets_NC, allow_nan=True)
            values[f"{part}_{name}"] = value_H.tolist()
        return values

    def _over_blocks(self, rows: Rows, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [N, h, C] computed block by block, in bounded memory."""
        size = self.stack.rows_at_once(self.inputs.num_places)
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return torch.cat([logits_of(self.inputs.batch(block)) for block in blocks])

    def further_metrics(self, stack_places: list[int]) -> list[dict[str, float]]:
        """Validation metrics of the remembered weights of some heads."""
        targets_NC = self._targets(self.validation)
        logits_NHC = self._over_blocks(
            self.validation, lambda features: self.stack.best_logits(features, stack_places)
        )
        return [further_metrics(logits_NC, targets_NC) for logits_NC in logits_NHC.unbind(1)]


def further_metrics(logits_NC: Tensor, targets_NC: Tensor) -> dict[str, float]:
    """Validation metrics that are worth computing once a trial, at its best epoch. The worst class'
    recall is left out where no class has enough pictures to be judged by."""
    worst = worst_class_recall(logits_NC, targets_NC)
    return {
        **({} if worst is None else {"validation_worst_class_recall": worst}),
        "validation_mean_average_precision": float(mean_average_precision(logits_NC, targets_NC)),
        "validation_macro_recall": float(macro_recall(logits_NC, targets_NC)),
        "validation_micro_f1": f1(torch.sigmoid(logits_NC), targets_NC),
    }
