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

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.inputs import FloatMatrix, Rows
from ..images.views import PLAIN, VIEWS
from ..precision import FLOAT32
from ..report import CohortReport, Metrics, Outcome, keep_going
from .group import Group, Part, Sources, Task
from .hosts import side_by_side
from .stack import bytes_of_head, in_runs, structure

STACK_BYTES = 2 << 30
"""Memory of one stack; more heads than fit form several."""
PART_HEADS = 4
"""Fewer heads than this are not cut into parts: a stack's own cost would outweigh the threads'."""


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
    further_views = further_views or {}
    task = Task(
        targets_NC=targets_NC,
        folds=folds,
        objective=objective,
        order_seed=order_seed,
        precision=precision,
        last_epoch=last_epoch,
    )
    sources = Sources(features=features, further_views=tuple(further_views.values()))
    parts = _parts(sources, [PLAIN.name, *further_views], configs, task, device)
    outcomes: dict[int, Outcome] = {}
    epoch = 0
    with side_by_side(parts, sources, task, device) as each:
        while len(outcomes) < len(configs):
            epoch += 1
            latest: dict[int, Metrics] = {}
            for news in each(partial(Group.train_epoch, epoch=epoch)):
                latest |= news
            # In the order of places, however the heads were cut into parts.
            latest = dict(sorted(latest.items()))
            stops = frozenset(report(epoch, latest)) if latest else frozenset()
            leave = partial(Group.let_leave, epoch=epoch, stops=stops, keep_state=keep_state)
            for ended in each(leave):
                outcomes |= ended
    return [outcomes[place] for place in range(len(configs))]


def _parts(
    sources: Sources,
    view_names: Sequence[str],
    configs: Sequence[TrialConfig],
    task: Task,
    device: torch.device | str,
) -> list[Part]:
    """Configs that can share a stack, in order of first appearance, each within STACK_BYTES, and
    in parts for the threads of a CPU."""
    num_parts = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    shape = sources.features.shape
    by_key: dict[object, list[int]] = defaultdict(list)
    for place, config in enumerate(configs):
        key = (structure(config), config.batch_size, config.feature_norm, config.views)
        by_key[key].append(place)
    parts = []
    for places in by_key.values():
        first = configs[places[0]]
        size = sum(
            bytes_of_head(
                first,
                num_features=shape[-1],
                num_places=shape[1] if len(shape) == 3 else 1,
                num_classes=task.targets_NC.shape[1],
                num_evaluated=len(validation),
            )
            for _, validation in task.folds
        )
        views = tuple(view_names.index(view.name) for view in VIEWS[first.views])
        # Sorted, a part has few kinds of losses and optimizers, each of which costs calls a step.
        places = [places[i] for i in in_runs([configs[place] for place in places])]
        count = max(1, min(STACK_BYTES // size, max(PART_HEADS, -(-len(places) // num_parts))))
        for start in range(0, len(places), count):
            part = {place: configs[place] for place in places[start : start + count]}
            parts.append(Part(configs=part, views=views))
    return parts
