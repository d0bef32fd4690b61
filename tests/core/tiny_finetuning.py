"""A fine-tuning of seconds, for tests; as a script, one rank of it over gloo, or a run to kill.

Started by `test_ranks.py` and `test_resume.py` as `tiny_finetuning.py SETTINGS.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import TrialConfig
from core.encoding.backbones import Backbone
from core.encoding.encoders import Encoder
from core.finetuning.checkpoint import Checkpoints
from core.finetuning.finetune import finetune
from core.finetuning.ranks import ALONE, Ranks, joined_ranks
from core.report import Metrics, Outcome

N, SIZE, C = 48, 24, 4
TRAIN, VALIDATION = np.arange(32, dtype=np.int64), np.arange(32, N, dtype=np.int64)
SETTINGS: dict[str, Any] = {
    "backbone": "tiny",
    "mode": "finetune",
    "unfrozen_stages": 2,
    "epochs": 3,
    "batch_size": 12,
    "lr": 0.01,
}


def config(**changes: Any) -> TrialConfig:
    return TrialConfig.from_dict({**SETTINGS, **changes})


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def encoder() -> Encoder:
    """Four stages of convolution and batch norm: maps of 12, 6, 3 and 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(_block(3, 4), _block(4, 6), _block(6, 8), _block(8, 8))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # as if it had been trained
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return Encoder(Backbone(name="tiny", input_size=SIZE), network)


def data() -> tuple[np.ndarray, Tensor]:
    """Pictures whose classes are bright quarters, with noise."""
    rng = np.random.default_rng(0)
    targets = (rng.random((N, C)) < 0.4).astype(np.float32)
    targets[:, 0] = np.maximum(targets[:, 0], targets.sum(1) == 0)
    pictures = rng.integers(0, 120, (N, SIZE, SIZE, 3))
    half = SIZE // 2
    for label, (top, left) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
        place = (slice(None), slice(top, top + half), slice(left, left + half), label % 3)
        pictures[place] += (targets[:, label, None, None] * 100).astype(np.int64)
    return pictures.astype(np.uint8), torch.from_numpy(targets)


def images(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures / 255.0).float().permute(0, 3, 1, 2)


def keep_going(epoch: int, metrics: Metrics) -> bool:
    return False


def train(trial: TrialConfig, **settings: Any) -> Outcome:
    pictures, targets_NC = data()
    settings = {"report": keep_going, "pictures": pictures, **settings}
    pictures = settings.pop("pictures")
    return finetune(encoder(), pictures, targets_NC, TRAIN, VALIDATION, trial, **settings)


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """What two runs can be compared by."""
    return {
        "status": str(outcome.status),
        "reason": outcome.reason,
        "curve": list(outcome.curve),
        "best_epoch": outcome.best_epoch,
        "best_value": outcome.best_value,
        "best_metrics": outcome.best_metrics,
        "state": outcome.state,
    }


class DeadlyPictures:
    """Pictures whose reader is killed, as by the system, at the given read."""

    def __init__(self, pictures: np.ndarray, reads: int) -> None:
        self.pictures, self.left = pictures, reads

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.pictures[rows]


def _talk(ranks: Ranks) -> dict[str, Any]:
    """What ranks say to each other: rank r hands in r rows of r."""
    own = torch.full((ranks.rank, 2), float(ranks.rank))
    return {
        "sum": ranks.sum(torch.tensor([ranks.rank + 1, 10])),
        "concat": ranks.concat(own),
        "agree": [ranks.agree(ranks.rank == 0), ranks.agree(ranks.rank == 1)],
    }


def _main(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    ranks: Ranks = ALONE
    if "count" in settings:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{settings['port']}",
            rank=settings["rank"],
            world_size=settings["count"],
        )
        ranks = joined_ranks()
    results: dict[str, Any] = {"talk": _talk(ranks)}
    for name, run in settings["runs"].items():
        changes, stop = dict(run), run.get("stop")
        changes.pop("stop", None)
        checkpoints = None
        if folder := changes.pop("folder", None):
            checkpoints = Checkpoints(Path(folder))
        pictures: Any = data()[0]
        if reads := changes.pop("killed_at_read", None):
            pictures = DeadlyPictures(pictures, reads)
        heard: list[int] = []

        def report(
            epoch: int, metrics: Metrics, heard: list[int] = heard, stop: int | None = stop
        ) -> bool:
            heard.append(epoch)
            return epoch == stop

        outcome = train(
            config(**changes),
            pictures=pictures,
            report=report,
            ranks=ranks,
            checkpoints=checkpoints,
        )
        results[name] = as_dict(outcome) | {"heard": heard}
    torch.save(results, settings["out"])
    if "count" in settings:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text()))
