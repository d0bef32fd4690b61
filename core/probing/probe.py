"""Training heads on the features of a frozen backbone, many at a time.

Trials whose heads share shape, batch size, views and feature scaling form one stack; all stacks of
the call advance epoch by epoch together, so that the report sees every trial at the same age. On a
CPU the heads are cut into as many stacks as there are threads, one each: threads that share one
stack's small operations wait for each other more than they work. A
trial's value is its best epoch's validation objective, and the weights kept are that epoch's.
With several folds a trial has one head a fold, and its metrics are means over the folds.
N pictures, H heads, C classes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.inputs import FloatMatrix, HeadInputs, Rows
from ..images.views import PLAIN, VIEWS
from ..metrics import (
    f1,
    macro_recall,
    mean_average_precision,
    topk_recall,
    worst_class_recall,
)
from ..precision import FLOAT32
from ..report import CohortReport, Metrics, Outcome, Status, keep_going
from .stack import HeadStack, bytes_of_head, in_runs, structure

METRICS: dict[str, Callable[..., Tensor]] = {
    "top3_accuracy": topk_recall,
    "mean_average_precision": mean_average_precision,
}
"""Objectives: (scores [H, N, C], targets [N, C], allow_nan) -> [H]; higher is better."""
STACK_BYTES = 2 << 30
"""Memory of one stack; more heads than fit form several."""
PART_HEADS = 4
"""Fewer heads than this are not cut into parts: a stack's own cost would outweigh the threads'."""

T = TypeVar("T")


def train_probes(
    features: FloatMatrix,
    targets_NC: Tensor,
    folds: Sequence[tuple[Rows, Rows]],
    configs: Sequence[TrialConfig],
    *,
    further_views: Mapping[str, FloatMatrix] | None = None,
    objective: str = "top3_accuracy",
    report: CohortReport = keep_going,
    order_seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = FLOAT32,
    keep_state: bool = False,
    last_epoch: int | None = None,
) -> list[Outcome]:
    """Train the head of every config on cached features and return what each came to.

    Args:
        features: [N, D], or [N, P, D] for csra heads; all configs fit them.
        targets_NC: 0/1 targets, float32.
        folds: (training rows, validation rows), once or once a fold.
        configs: one a trial.
        further_views: view's name -> its matrix, as `features`, which is the plain view; all that
            the configs' `views` name.
        objective: which validation metric is the trial's value; see METRICS.
        report: hears every epoch of all running trials, says which stop.
        order_seed: seeds the order of batches, which trials share.
        precision: in which heads are trained; they are judged in float32. See `core.precision`.
        keep_state: return the first fold's best weights with each outcome.
        last_epoch: end every trial after this epoch of its schedule, and keep that epoch's value
            and weights whatever validation says: for rows that it can say nothing about.
    """
    task = _Task(
        targets_NC=targets_NC,
        folds=folds,
        objective=objective,
        order_seed=order_seed,
        precision=precision,
        last_epoch=last_epoch,
    )
    groups = _group(features, further_views or {}, configs, task, device)
    epoch = 0
    with _side_by_side(groups, device) as each:
        while any(group.running for group in groups):
            epoch += 1
            latest: dict[int, Metrics] = {}
            for news in each(partial(_Group.train_epoch, epoch=epoch)):
                latest |= news
            stops = frozenset(report(epoch, latest)) if latest else frozenset()
            each(partial(_Group.let_leave, epoch=epoch, stops=stops, keep_state=keep_state))
    outcomes = {place: outcome for group in groups for place, outcome in group.outcomes.items()}
    return [outcomes[place] for place in range(len(configs))]


@contextmanager
def _side_by_side(
    groups: Sequence[_Group], device: torch.device | str
) -> Iterator[Callable[[Callable[[_Group], T]], list[T]]]:
    """Yields a function that applies another one to every group: on a CPU in threads of one core
    each. How long a call takes is what the slowest of them takes."""
    num_threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or min(num_threads, len(groups)) < 2:
        yield lambda function: [function(group) for group in groups]
        return
    torch.set_num_threads(1)  # Of each thread; torch knows no other way to say it.
    try:
        with ThreadPoolExecutor(num_threads) as threads:
            yield lambda function: list(threads.map(function, groups))
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What all groups of a call share: see `train_probes`."""

    targets_NC: Tensor
    folds: Sequence[tuple[Rows, Rows]]
    objective: str
    order_seed: int
    precision: str
    last_epoch: int | None


def _group(
    features: FloatMatrix,
    further_views: Mapping[str, FloatMatrix],
    configs: Sequence[TrialConfig],
    task: _Task,
    device: torch.device | str,
) -> list[_Group]:
    """Configs that can share a stack, in order of first appearance, each within STACK_BYTES, and
    in parts for the threads of a CPU."""
    num_parts = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    by_key: dict[object, list[int]] = defaultdict(list)
    for place, config in enumerate(configs):
        key = (structure(config), config.batch_size, config.feature_norm, config.views)
        by_key[key].append(place)
    view_names = [PLAIN.name, *further_views]
    inputs: dict[str, list[HeadInputs]] = {}
    groups = []
    for places in by_key.values():
        first = configs[places[0]]
        if first.feature_norm not in inputs:
            inputs[first.feature_norm] = [
                HeadInputs(
                    features,
                    norm=first.feature_norm,
                    train_rows=train,
                    device=device,
                    further_views=list(further_views.values()),
                )
                for train, _ in task.folds
            ]
        scaled = inputs[first.feature_norm]
        size = sum(
            bytes_of_head(
                first,
                num_features=features.shape[-1],
                num_places=scaled[0].num_places,
                num_classes=task.targets_NC.shape[1],
                num_evaluated=len(validation),
            )
            for _, validation in task.folds
        )
        views = [view_names.index(view.name) for view in VIEWS[first.views]]
        # Sorted, a part has few kinds of losses and optimizers, each of which costs calls a step.
        places = [places[i] for i in in_runs([configs[place] for place in places])]
        count = max(1, min(STACK_BYTES // size, max(PART_HEADS, -(-len(places) // num_parts))))
        for start in range(0, len(places), count):
            part = {p: configs[p] for p in places[start : start + count]}
            groups.append(_Group(part, scaled, views, task))
    return groups


class _Group:
    """Trials that share a stack (one stack a fold): their heads, curves and ends."""

    def __init__(
        self,
        configs: dict[int, TrialConfig],
        inputs: Sequence[HeadInputs],
        views: Sequence[int],
        task: _Task,
    ) -> None:
        self.configs = configs
        self.task = task
        self.curves: dict[int, list[dict[str, float]]] = {place: [] for place in configs}
        self.best: dict[int, tuple[float, int]] = {}
        self.seconds: dict[int, float] = dict.fromkeys(configs, 0.0)
        self.diverged: dict[int, str] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.folds = [
            _Fold(list(configs.values()), fold_inputs, train, validation, np.array(views), task)
            for fold_inputs, (train, validation) in zip(inputs, task.folds, strict=True)
        ]
        self._places = list(configs)

    @property
    def running(self) -> list[int]:
        """Places of the trials still in the stack, in stack order."""
        return [self._places[m] for m in self.folds[0].stack.members]

    def train_epoch(self, epoch: int) -> dict[int, Metrics]:
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

    def let_leave(self, epoch: int, stops: frozenset[int], keep_state: bool) -> None:
        """End the trials that are done, stopped or diverged, and take their heads out."""
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
        self.outcomes[place] = Outcome(
            status=status,
            reason=reason,
            curve=tuple(self.curves[place]),
            best_epoch=epoch,
            best_value=value,
            best_metrics=metrics or {},
            seconds=self.seconds[place],
            state=state,
        )


class _Fold:
    """One stack on one fold's rows."""

    def __init__(
        self,
        configs: Sequence[TrialConfig],
        inputs: HeadInputs,
        train: Rows,
        validation: Rows,
        views: Rows,
        task: _Task,
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
