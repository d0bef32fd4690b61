"""Heads that train in one stack, epoch by epoch: one stack a fold, their curves and their ends.

A group lives in one thread at a time, of this process or of a helper's, and can move (`hosts`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.inputs import FloatMatrix, HeadInputs
from ..images.views import PLAIN, VIEWS
from ..precision import without_denormals
from ..report import Metrics, Outcome, Status
from .fold import Fold, Task
from .kept_inputs import CohortInputs
from .stack import HeadStack


@dataclass(frozen=True, kw_only=True)
class Source:
    """The features that a group reads: the plain view, and further ones by their names."""

    features: FloatMatrix
    further_views: Mapping[str, FloatMatrix] = field(default_factory=dict)

    def places_of(self, views: str) -> tuple[int, ...]:
        """Those that `TrialConfig.views` names: 0 is the plain one."""
        names = [PLAIN.name, *self.further_views]
        return tuple(names.index(view.name) for view in VIEWS[views])


@dataclass(frozen=True, kw_only=True)
class Part:
    """Trials that share a stack."""

    configs: dict[int, TrialConfig]
    """By place."""
    seconds: dict[int, float]
    """By place, what an epoch about costs."""
    source: int = 0
    """Of the features that they read, among the call's."""

    @property
    def first(self) -> TrialConfig:
        return next(iter(self.configs.values()))


@dataclass(kw_only=True)
class GroupState:
    """All that a group is, but for what it reads: it can go on from it in another process."""

    part: Part
    views: tuple[int, ...]
    """That it draws from: 0 is the plain one."""
    stacks: list[HeadStack]
    """One a fold."""
    curves: dict[int, list[dict[str, float]]]
    """By place, as all that follow."""
    best: dict[int, tuple[float, int]]
    seconds: dict[int, float]
    diverged: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What came of one, by place."""

    metrics: dict[int, Metrics]
    """Of the trials that did not diverge."""
    seconds: dict[int, float]
    """A trial's share of what its group took."""


class GroupBuilder:
    """Makes groups, new ones and those that another process began. What they read is scaled once
    for all that scale alike."""

    def __init__(self, sources: Sequence[Source], task: Task, inputs: CohortInputs) -> None:
        self._sources = sources
        self._task = task
        self._inputs = inputs

    def begin(self, part: Part) -> Group:
        """A part's group before its first epoch."""
        configs, task = part.configs, self._task
        stacks = [
            HeadStack(
                list(configs.values()),
                num_features=inputs.num_features,
                train_targets_NC=task.targets_NC[torch.from_numpy(train)],
                steps_per_epoch=-(-len(train) // part.first.batch_size),
                device=inputs.device,
                precision=task.precision,
            )
            for inputs, (train, _) in zip(self._inputs_of(part), task.folds, strict=True)
        ]
        state = GroupState(
            part=part,
            views=self._sources[part.source].places_of(part.first.views),
            stacks=stacks,
            curves={place: [] for place in configs},
            best={},
            seconds=dict.fromkeys(configs, 0.0),
            diverged={},
        )
        return self.go_on(state)

    def go_on(self, state: GroupState) -> Group:
        """The group whose `state` this is."""
        return Group(state, self._inputs_of(state.part), self._task)

    def _inputs_of(self, part: Part) -> list[HeadInputs]:
        """Of each fold."""
        return [
            self._inputs.of(part.source, norm=part.first.feature_norm, train_rows=train)
            for train, _ in self._task.folds
        ]


class Group:
    """Trials that share a stack (one stack a fold): their heads, curves and ends."""

    def __init__(self, state: GroupState, inputs: Sequence[HeadInputs], task: Task) -> None:
        self.state = state
        self.configs = state.part.configs
        self.task = task
        self._ended: dict[int, Outcome] = {}
        self.folds = [
            Fold(stack, fold_inputs, train, validation, np.array(state.views), task)
            for stack, fold_inputs, (train, validation) in zip(
                state.stacks, inputs, task.folds, strict=True
            )
        ]
        self._places = list(self.configs)

    @property
    def running(self) -> list[int]:
        """Places of the trials still in the stack, in stack order."""
        return [self._places[m] for m in self.folds[0].stack.members]

    def train_epoch(self, *, epoch: int) -> Epoch:
        """One pass over the training rows and one look at the validation rows."""
        running = self.running
        if not running:
            return Epoch(metrics={}, seconds={})
        started = time.perf_counter()
        with without_denormals():
            folds = [fold.train_epoch(epoch) for fold in self.folds]
        share = (time.perf_counter() - started) / len(running)
        latest: dict[int, Metrics] = {}
        improved = []
        for stack_place, place in enumerate(running):
            self.state.seconds[place] += share
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
                self.state.diverged[place] = f"diverged in epoch {epoch}: {', '.join(wrong)}"
                continue
            self.state.curves[place].append(metrics)
            latest[place] = metrics
            value = metrics[f"validation_{self.task.objective}"]
            newest = self.task.last_epoch is not None
            if newest or place not in self.state.best or value > self.state.best[place][0]:
                self.state.best[place] = (value, epoch)
                improved.append(stack_place)
        for fold in self.folds:
            fold.stack.remember(improved)
        return Epoch(metrics=latest, seconds=dict.fromkeys(running, share))

    def let_leave(
        self, *, epoch: int, stops: frozenset[int], keep_state: bool
    ) -> dict[int, Outcome]:
        """End the trials that are done, stopped or diverged, and take their heads out; what they
        came to, by place."""
        stay, complete = [], []
        for stack_place, place in enumerate(self.running):
            if place in self.state.diverged:
                self._end(place, Status.FAILED, self.state.diverged[place])
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
        value, epoch = self.state.best.get(place, (None, None))
        self._ended[place] = Outcome(
            status=status,
            reason=reason,
            curve=tuple(self.state.curves[place]),
            best_epoch=epoch,
            best_value=value,
            best_metrics=metrics or {},
            seconds=self.state.seconds[place],
            state=state,
        )
