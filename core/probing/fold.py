"""One stack on one fold's rows: an epoch of training, and what validation says of it.

N pictures, H heads, h some of them, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..encoding.inputs import HeadInputs, Rows
from ..objectives import METRICS, further_metrics
from ..precision import product_type
from .stack import HeadStack


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all groups of a call share: see `train_probes`."""

    targets_NC: Tensor
    folds: Sequence[tuple[Rows, Rows]]
    objective: str
    order_seed: int
    precision: str
    last_epoch: int | None


class Fold:
    """One stack on one fold's rows."""

    def __init__(
        self,
        stack: HeadStack,
        inputs: HeadInputs,
        train: Rows,
        validation: Rows,
        views: Rows,
        task: Task,
    ) -> None:
        self.stack = stack
        self.inputs = inputs
        self.targets_NC = task.targets_NC.to(inputs.device)
        self.train = train
        self.validation = validation
        self.views = views
        self.batch_size = stack.configs[0].batch_size
        self.objective = task.objective
        self.order_seed = task.order_seed
        # As many training as validation rows, spread evenly: a training accuracy at little cost.
        step = max(1, len(train) // len(validation))
        self.train_sample = train[::step][: len(validation)]
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        """Targets of what is evaluated, as losses and as metrics read them."""

    def train_epoch(self, epoch: int) -> dict[str, list[float]]:
        """Metrics of the epoch: name -> one value a head, in stack order; may be NaN."""
        # Of the study's seed, not of the trials': the same whoever is in the stack.
        chance = np.random.default_rng([self.order_seed, epoch])
        order = chance.permutation(self.train)
        views = self.views[chance.integers(len(self.views), size=len(order))]
        kind = product_type(self.stack.precision)
        total_H = torch.zeros(len(self.stack), dtype=torch.float64, device=self.inputs.device)
        for start in range(0, len(order), self.batch_size):
            batch = slice(start, start + self.batch_size)
            rows = order[batch]
            features = self.inputs.batch(
                rows, views[batch] if len(self.views) > 1 else None, dtype=kind
            )
            total_H += self.stack.step(features, self._targets(rows)) * len(rows)
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
        return self.targets_NC.index_select(0, torch.from_numpy(rows).to(self.inputs.device))

    @torch.no_grad()
    def _evaluate(self, rows: Rows, part: str, names: Sequence[str]) -> dict[str, list[float]]:
        if part not in self._known:
            targets_NC = self._targets(rows)
            self._known[part] = targets_NC, targets_NC > 0
        targets_NC, is_true_NC = self._known[part]
        # What decides nothing may be computed as training is.
        exact = part == "validation"
        logits_HNC = self._over_blocks(rows, partial(self.stack.logits, exact=exact))
        values: dict[str, list[float]] = {}
        if part == "validation":
            values["validation_loss"] = self.stack.losses(logits_HNC, targets_NC).tolist()
        for name in names:
            value_H = METRICS[name](logits_HNC, is_true_NC, allow_nan=True)
            values[f"{part}_{name}"] = value_H.tolist()
        return values

    def _over_blocks(self, rows: Rows, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [h, N, C] computed block by block, in bounded memory."""
        size = self.stack.rows_at_once(self.inputs.num_places)
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        logits = [logits_of(self.inputs.batch(block)) for block in blocks]
        return torch.cat(logits, 1) if len(logits) > 1 else logits[0]

    def further_metrics(self, stack_places: list[int]) -> list[dict[str, float]]:
        """Validation metrics of the remembered weights of some heads."""
        targets_NC = self._targets(self.validation)
        logits_HNC = self._over_blocks(
            self.validation, lambda features: self.stack.best_logits(features, stack_places)
        )
        return [further_metrics(logits_NC, targets_NC) for logits_NC in logits_HNC]
