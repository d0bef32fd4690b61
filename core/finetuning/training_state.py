"""All that changes while a model is fine-tuned, and its way into a checkpoint and back.

The model, the average of its weights, the optimizer, how far it has come, and the state of chance.
The schedule's and the order's positions are functions of the epoch, so the epoch is all there is
to keep of them. N pictures of validation, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.classifier import PictureClassifier
from .checkpoint import Checkpoints
from .ema import AveragedWeights
from .ranks import Ranks

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """What has come of the epochs so far."""

    epoch: int = 0
    """The last one that is done, counted from 1."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each epoch."""
    best_value: float | None = None
    best_epoch: int | None = None
    best_logits_NC: Tensor | None = None
    """Validation logits at the best epoch."""
    best_state: dict[str, Tensor] | None = None
    """The model at the best epoch, on the CPU. Rank 0's alone."""
    seconds: float = 0.0
    """Time that training has taken, over all its interruptions."""


@dataclass(kw_only=True)
class TrainingState:
    """A model in training."""

    model: PictureClassifier
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None
    """None: the weights as they are."""
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the model is as it is validated and kept: with averaged weights if any."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def record(
        self,
        metrics: dict[str, float],
        value: float,
        logits_NC: Tensor,
        *,
        keep_state: bool,
        newest: bool = False,
    ) -> None:
        """The epoch after the last one is done, with this objective and validation logits.
        `newest`: it counts as the best, whatever its objective."""
        progress = self.progress
        progress.epoch += 1
        progress.curve.append(metrics)
        if newest or progress.best_value is None or value > progress.best_value:
            progress.best_value, progress.best_epoch = value, progress.epoch
            progress.best_logits_NC = logits_NC.cpu()
            if keep_state:
                with self.averaged():
                    weights = self.model.state_dict()
                    progress.best_state = {k: v.cpu().clone() for k, v in weights.items()}

    def save(self, checkpoints: Checkpoints, trial: Mapping[str, Any], ranks: Ranks) -> None:
        """Write a checkpoint of rank 0's state; `trial` says what it belongs to.

        Raises InputError on all ranks if it cannot be written."""
        chance = ranks.concat(_random_state(self.device)[None])
        error: InputError | None = None
        if ranks.rank == 0:
            average = self.average.state_dict() if self.average is not None else None
            try:
                checkpoints.save(
                    {
                        "trial": dict(trial),
                        "progress": vars(self.progress),
                        "model": self.model.state_dict(),
                        "average": average,
                        "optimizer": self.optimizer.state_dict(),
                        "chance": chance,
                    }
                )
            except InputError as raised:
                error = raised
        # Told to all, as the others would wait for a rank that has left.
        if ranks.agree(error is not None):
            raise error or InputError(
                "rank 0 could not write a checkpoint", where=str(checkpoints.folder)
            )

    def restore(self, checkpoints: Checkpoints, trial: Mapping[str, Any], ranks: Ranks) -> bool:
        """Go on from the last checkpoint; False, and nothing is changed, if there is none of this
        trial.

        Raises InputError if ranks see unlike checkpoints."""
        saved = checkpoints.load()
        if saved is not None and saved["trial"] != dict(trial):
            _logger.warning(
                "%s holds the checkpoint of another trial: training starts anew",
                checkpoints.folder,
            )
            saved = None
        epoch = 0 if saved is None else int(saved["progress"]["epoch"])
        epochs = ranks.concat(torch.tensor([epoch])).tolist()
        if len(set(epochs)) > 1:
            raise InputError(
                f"workers see checkpoints of unlike epochs: {epochs}",
                where=str(checkpoints.folder),
                hint="put TUNER_HOME on storage that every node sees",
            )
        if saved is None:
            return False
        self.progress = Progress(**saved["progress"])
        if ranks.rank > 0:
            self.progress = dataclasses.replace(self.progress, best_state=None)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        chance = saved["chance"]
        if chance.shape == (ranks.count, len(_random_state(self.device))):
            _set_random_state(chance[ranks.rank], self.device)
        else:  # with other ranks or another device there is no run to be equal to
            seed_rank(int(trial["config"]["seed"]) + epoch, ranks)
        return True


def seed_rank(seed: int, ranks: Ranks) -> None:
    """Give each rank chance of its own for dropout and drop path; rank 0's is the seed's."""
    if ranks.rank:
        words = np.random.SeedSequence([seed, ranks.rank]).generate_state(2, np.uint32)
        seed = int(words[0]) << 31 | int(words[1]) >> 1
    torch.manual_seed(seed)


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Rank 0's buffers, such as the statistics of batch norms, on all ranks."""
    for buffer in model.buffers():
        own = buffer if ranks.rank == 0 else torch.zeros_like(buffer)
        buffer.copy_(ranks.sum(own))


def _random_state(device: torch.device) -> Tensor:
    """Of torch's generators on the CPU and, behind it, on the device: bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
