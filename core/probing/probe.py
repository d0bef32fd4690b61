"""Training heads on the features of a frozen backbone, many at a time.

Trials whose heads share shape, batch size, views and feature scaling form one stack; all stacks of
the call advance epoch by epoch together, so that the report sees every trial at the same age. On a
CPU a stack has one thread, and those that would keep one busy for longer than the others are cut:
threads that share one stack's small operations wait for each other more than they work. A trial's
value is its best epoch's validation objective, and the weights kept are that epoch's. With several
folds a trial has one head a fold, and its metrics are means over the folds.
N pictures, H heads, C classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.inputs import FloatMatrix, Rows
from ..head_settings import structure
from ..kernels.ready import load_kernels
from ..precision import FLOAT32
from ..report import CohortReport, Metrics, Outcome, keep_going
from .costs import seconds_of_epoch
from .fold import Task
from .group import Group, Part, Source
from .hosts import side_by_side
from .kept_inputs import KeptInputs
from .stack import bytes_of_head, in_runs

STACK_BYTES = 2 << 30
"""Memory of one stack; more heads than fit form several."""
SLACK = 0.1
"""By which a stack may exceed a thread's share before it is cut: a stack has a cost of its own."""


def train_probes(
    features: FloatMatrix,
    targets_NC: Tensor,
    folds: Sequence[tuple[Rows, Rows]],
    configs: Sequence[TrialConfig],
    *,
    further_views: Mapping[str, FloatMatrix] | None = None,
    **settings: Any,
) -> list[Outcome]:
    """`train_mixed_probes` for configs that all read the same features.

    Args:
        features: [N, D], or [N, P, D] for csra heads; all configs fit them.
        targets_NC: 0/1 targets, float32.
        folds: (training rows, validation rows), once or once a fold.
        configs: one a trial.
        further_views: view's name -> its matrix, as `features`, which is the plain view; all that
            the configs' `views` name.
        settings: as for `train_mixed_probes`.
    """
    source = Source(features=features, further_views=further_views or {})
    places = [0] * len(configs)
    return train_mixed_probes([source], places, targets_NC, folds, configs, **settings)


def train_mixed_probes(
    sources: Sequence[Source],
    source_of: Sequence[int],
    targets_NC: Tensor,
    folds: Sequence[tuple[Rows, Rows]],
    configs: Sequence[TrialConfig],
    *,
    objective: str = "top3_accuracy",
    report: CohortReport = keep_going,
    order_seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = FLOAT32,
    keep_state: bool = False,
    last_epoch: int | None = None,
    kept: KeptInputs | None = None,
) -> list[Outcome]:
    """Train the head of every config on cached features and return what each came to.

    Args:
        sources: of features, by backbones for instance; see `train_probes` for each.
        source_of: which of them each config reads.
        targets_NC: 0/1 targets, float32.
        folds: (training rows, validation rows), once or once a fold.
        configs: one a trial.
        objective: which validation metric is the trial's value; see `core.objectives.METRICS`.
        report: hears every epoch of all running trials, says which stop.
        order_seed: seeds the order of batches, which trials share.
        precision: in which heads are trained; they are judged in float32. See `core.precision`.
        keep_state: return the first fold's best weights with each outcome.
        last_epoch: end every trial after this epoch of its schedule, and keep that epoch's value
            and weights whatever validation says: for rows that it can say nothing about.
        kept: scaled features of earlier calls, where they read the same files.
    """
    task = Task(
        targets_NC=targets_NC,
        folds=folds,
        objective=objective,
        order_seed=order_seed,
        precision=precision,
        last_epoch=last_epoch,
    )
    if torch.device(device).type == "cpu":
        load_kernels()  # Before anything is timed.
    parts = _parts(sources, source_of, configs, task, device)
    outcomes: dict[int, Outcome] = {}
    epoch = 0
    with side_by_side(parts, sources, task, device, kept or KeptInputs()) as crew:
        while len(outcomes) < len(configs):
            epoch += 1
            latest: dict[int, Metrics] = {}
            seconds: dict[int, float] = {}
            for news in crew.each(partial(Group.train_epoch, epoch=epoch)):
                latest |= news.metrics
                seconds |= news.seconds
            # In the order of places, however the heads were cut into parts.
            latest = dict(sorted(latest.items()))
            stops = frozenset(report(epoch, latest)) if latest else frozenset()
            leave = partial(Group.let_leave, epoch=epoch, stops=stops, keep_state=keep_state)
            ended: dict[int, Outcome] = {}
            for some in crew.each(leave):
                ended |= some
            outcomes |= ended
            crew.balance(ended, seconds)
    return [outcomes[place] for place in range(len(configs))]


def _parts(
    sources: Sequence[Source],
    source_of: Sequence[int],
    configs: Sequence[TrialConfig],
    task: Task,
    device: torch.device | str,
) -> list[Part]:
    """Configs that can share a stack, in order of first appearance, each within STACK_BYTES, and
    on a CPU cut up where one thread would have more to do than its share."""
    num_threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    seconds = [
        seconds_of_epoch(
            config,
            num_features=sources[source].features.shape[-1],
            num_classes=task.targets_NC.shape[1],
            num_rows=len(task.folds[0][0]),
        )
        for source, config in zip(source_of, configs, strict=True)
    ]
    share = sum(seconds) / num_threads
    by_key: dict[object, list[int]] = defaultdict(list)
    for place, (source, config) in enumerate(zip(source_of, configs, strict=True)):
        key = (source, structure(config), config.batch_size, config.feature_norm, config.views)
        by_key[key].append(place)
    parts = []
    for places in by_key.values():
        source = source_of[places[0]]
        cuts = math.ceil(sum(seconds[place] for place in places) / share - SLACK)
        most = STACK_BYTES // _bytes_of_head(configs[places[0]], sources[source], task)
        size = max(1, min(most, -(-len(places) // max(1, cuts))))
        # Sorted, a part has few kinds of losses and optimizers, each of which costs calls a step.
        places = [places[i] for i in in_runs([configs[place] for place in places])]
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            parts.append(
                Part(
                    configs={place: configs[place] for place in chosen},
                    seconds={place: seconds[place] for place in chosen},
                    source=source,
                )
            )
    return parts


def _bytes_of_head(config: TrialConfig, source: Source, task: Task) -> int:
    """Of all folds."""
    shape = source.features.shape
    return sum(
        bytes_of_head(
            config,
            num_features=shape[-1],
            num_places=shape[1] if len(shape) == 3 else 1,
            num_classes=task.targets_NC.shape[1],
            num_evaluated=len(validation),
        )
        for _, validation in task.folds
    )
