"""A fine-tuning that was killed and goes on gives, to the bit, the numbers of one that was not."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from core.errors import InputError
from core.finetuning.checkpoint import LAST, PREVIOUS, Checkpoints
from core.report import Metrics, Status

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that a checkpoint has to hold, or that draws by chance.
SETTINGS: dict[str, Any] = {
    "unfrozen_stages": 3,
    "unfreeze_epochs": 2,
    "dropout": 0.3,
    "ema_decay": 0.7,
    "batch_norm": "train",
    "batch_size": 6,
    "accumulation_steps": 2,
    "mixup_alpha": 0.4,
    "cutmix_alpha": 0.4,
    "horizontal_flip": True,
    "min_crop_scale": 0.6,
    "schedule": "one_cycle",
    "warmup_fraction": 0.3,
    "epochs": 5,
}


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    states = first.pop("state"), second.pop("state")
    assert first == second
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_every_epoch_can_be_gone_on_from(tiny: ModuleType, tmp_path: Path, optimizer: str) -> None:
    """A report that fails ends each run after one epoch more, as a lost driver does."""
    extra = {"momentum": 0.9} if optimizer == "sgd" else {}
    trial = tiny.config(**SETTINGS, **extra, optimizer=optimizer, lr=0.003)
    undisturbed = tiny.train(trial)
    heard: list[tuple[int, Metrics]] = []
    allowed = 0

    def report(epoch: int, metrics: Metrics) -> bool:
        if epoch > allowed:
            raise ConnectionError("the driver is gone")
        heard.append((epoch, metrics))
        return False

    for allowed in range(trial.epochs):  # noqa: B007 the report reads it
        with pytest.raises(ConnectionError):
            tiny.train(trial, report=report, checkpoints=Checkpoints(tmp_path))
    allowed = trial.epochs
    outcome = tiny.train(trial, report=report, checkpoints=Checkpoints(tmp_path))
    assert _same(tiny.as_dict(outcome), tiny.as_dict(undisturbed))
    assert [epoch for epoch, _ in heard] == [1, 2, 3, 4, 5]
    assert [metrics for _, metrics in heard] == list(undisturbed.curve)


@pytest.mark.parametrize("reads", [2, 15, 22])
def test_a_killed_process_is_gone_on_from(
    tiny: ModuleType,
    tmp_path: Path,
    start_tiny: Callable[[Path, dict[str, Any]], subprocess.Popen[str]],
    reads: int,
) -> None:
    """SIGKILL amid an epoch: an epoch reads six batches and one block of validation."""
    folder = tmp_path / "last"
    run = {**SETTINGS, "folder": str(folder), "killed_at_read": reads}
    process = start_tiny(tmp_path, {"out": str(tmp_path / "out.pt"), "runs": {"run": run}})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    checkpoints = Checkpoints(folder)
    saved = checkpoints.load()
    assert (0 if saved is None else saved["progress"]["epoch"]) == (reads - 2) // 7
    trial = tiny.config(**SETTINGS)
    resumed = tiny.train(trial, checkpoints=checkpoints)
    assert _same(tiny.as_dict(resumed), tiny.as_dict(tiny.train(trial)))


def test_a_stop_that_was_written_but_not_heard_is_asked_for_again(
    tiny: ModuleType, tmp_path: Path
) -> None:
    trial = tiny.config()
    first = tiny.train(trial, report=lambda e, m: e == 2, checkpoints=Checkpoints(tmp_path))
    again = tiny.train(trial, report=lambda e, m: e == 2, checkpoints=Checkpoints(tmp_path))
    assert first.status is again.status is Status.PRUNED
    assert _same(tiny.as_dict(first), tiny.as_dict(again))


def test_a_finished_run_trains_no_more(tiny: ModuleType, tmp_path: Path) -> None:
    trial = tiny.config()
    first = tiny.train(trial, checkpoints=Checkpoints(tmp_path))
    pictures = tiny.DeadlyPictures(tiny.data()[0], reads=1)  # reading one would end the test
    again = tiny.train(trial, checkpoints=Checkpoints(tmp_path), pictures=pictures)
    assert first.status is again.status is Status.COMPLETE
    assert again.seconds > 0
    assert _same(tiny.as_dict(first), tiny.as_dict(again))


@pytest.mark.parametrize("other", [{"lr": 0.02}, {"seed": 1}, {"epochs": 4}], ids=str)
def test_another_trials_checkpoint_is_not_gone_on_from(
    tiny: ModuleType, tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tiny.train(tiny.config(), checkpoints=Checkpoints(tmp_path))
    trial = tiny.config(**other)
    outcome = tiny.train(trial, checkpoints=Checkpoints(tmp_path))
    assert "checkpoint of another trial" in caplog.text
    assert _same(tiny.as_dict(outcome), tiny.as_dict(tiny.train(trial)))


def test_it_goes_on_from_the_older_one_if_the_last_is_damaged(
    tiny: ModuleType, tmp_path: Path
) -> None:
    trial = tiny.config(ema_decay=0.5)
    tiny.train(trial, report=lambda e, m: e == 2, checkpoints=Checkpoints(tmp_path))
    (tmp_path / LAST).write_bytes(b"damaged")
    assert (tmp_path / PREVIOUS).exists()
    heard: list[int] = []
    outcome = tiny.train(
        trial,
        report=lambda epoch, metrics: bool(heard.append(epoch)),
        checkpoints=Checkpoints(tmp_path),
    )
    assert heard == [1, 2, 3]
    assert _same(tiny.as_dict(outcome), tiny.as_dict(tiny.train(trial)))


def test_a_checkpoint_that_cannot_be_written_ends_the_trial(
    tiny: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a checkpoint cannot be written"):
        tiny.train(tiny.config(), checkpoints=Checkpoints(tmp_path / "file"))
