"""What a fine-tuning run is given and does not change: data, settings, and what follows from them.

N pictures, B batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.inputs import Rows
from ..images.pixels import Pictures
from ..losses import LOSSES, class_weights
from ..schedules import FloatArray, rate_factors
from .batches import steps_per_epoch
from .ranks import Ranks
from .unfreezing import num_unfrozen


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One trial on one rank. `core.finetuning.finetune.finetune` says what each of these is."""

    pictures: Pictures
    targets_NC: Tensor
    train: Rows
    validation: Rows
    config: TrialConfig
    objective: str
    order_seed: int
    device: torch.device
    ranks: Ranks
    precision: str
    compile: bool
    last_epoch: int | None = None

    @property
    def num_epochs(self) -> int:
        """Epochs to train, of those that the schedule is made for."""
        return min(self.config.epochs, self.last_epoch or self.config.epochs)

    @property
    def trial(self) -> dict[str, Any]:
        """What a checkpoint belongs to: with the same of it, the numbers are the same."""
        return {
            "config": self.config.to_dict(),
            "objective": self.objective,
            "order_seed": self.order_seed,
            "num_train": len(self.train),
            "num_validation": len(self.validation),
            "precision": self.precision,
            "last_epoch": self.last_epoch,
        }

    def targets(self, rows: Rows) -> Tensor:
        """Targets [n, C] of some rows, on the CPU."""
        return self.targets_NC[torch.from_numpy(rows)]

    def losses(self, logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
        """The loss of each picture [B]."""
        kind = LOSSES[self.config.loss]
        losses_B: Tensor = kind.function(
            logits_BC,
            targets_BC,
            label_smoothing=self.config.label_smoothing,
            class_weights_C=self._label_weights,
            **{key: getattr(self.config, key) for key in kind.parameters},
        )
        return losses_B

    def rate_factors(self, epoch: int) -> FloatArray:
        """The schedule's factor on the peak rates at each step of an epoch, counted from 1."""
        num_steps = self._steps_per_epoch
        return self._factors[(epoch - 1) * num_steps : epoch * num_steps]

    def num_unfrozen(self, epoch: int, num_stages: int) -> int:
        """How many of a backbone's stages are trained in an epoch."""
        return num_unfrozen(
            self.config.unfrozen_stages,
            self.config.unfreeze_epochs,
            num_stages=num_stages,
            epoch=epoch,
        )

    @cached_property
    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(
            len(self.train),
            batch_size=self.config.batch_size,
            accumulation_steps=self.config.accumulation_steps,
        )

    @cached_property
    def _factors(self) -> FloatArray:
        return rate_factors(
            self.config.schedule,
            num_steps=self._steps_per_epoch * self.config.epochs,
            warmup_fraction=self.config.warmup_fraction,
        )

    @cached_property
    def _label_weights(self) -> Tensor | None:
        weights_C = class_weights(self.config.class_weights, self.targets(self.train))
        return None if weights_C is None else weights_C.to(self.device)
