"""Several ranks train as one: real processes over gloo against the one in this process."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from core.finetuning.ranks import ALONE

Results = dict[int, list[dict[str, Any]]]

# Settings under which the number of ranks changes nothing but the order of sums.
ALIKE: dict[str, dict[str, Any]] = {
    "plain": {"horizontal_flip": True},
    "all": {
        "unfrozen_stages": 3,
        "unfreeze_epochs": 1,
        "layer_lr_decay": 0.5,
        "batch_size": 5,  # 32 pictures: the last batch of 2 leaves the third rank without one
        "accumulation_steps": 2,
        "clip_norm": 0.5,
        "ema_decay": 0.5,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 0.01,
        "class_weights": "sqrt_inverse",
        "schedule": "cosine",
        "warmup_fraction": 0.2,
        "min_crop_scale": 0.5,
        "randaugment_magnitude": 9,
    },
}
# Settings that look at a rank's own pictures.
RUNS: dict[str, dict[str, Any]] = {
    **ALIKE,
    "stopped": {"stop": 1},
    "own": {"batch_norm": "train", "dropout": 0.3, "mixup_alpha": 0.5, "ema_decay": 0.5},
    # Interrupted by a stop, and run once more from the checkpoint.
    "first": {"batch_norm": "train", "dropout": 0.3, "ema_decay": 0.5, "stop": 1},
    "resumed": {"batch_norm": "train", "dropout": 0.3, "ema_decay": 0.5},
    "undisturbed": {"batch_norm": "train", "dropout": 0.3, "ema_decay": 0.5},
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    start_tiny: Callable[[Path, dict[str, Any]], subprocess.Popen[str]],
) -> Results:
    """Of each number of ranks, the results of each rank."""
    found: Results = {}
    for count in (2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{count}")
        runs = {
            name: run | ({"folder": str(folder / "last")} if name in ("first", "resumed") else {})
            for name, run in RUNS.items()
        }
        port = _free_port()
        processes = [
            start_tiny(
                folder,
                {
                    "rank": rank,
                    "count": count,
                    "port": port,
                    "out": str(folder / f"{rank}.pt"),
                    "runs": runs,
                },
            )
            for rank in range(count)
        ]
        try:
            for process in processes:
                _, errors = process.communicate(timeout=150)
                assert process.returncode == 0, errors
                assert "bucket" not in errors  # gradients lie as DDP's buckets do
        finally:
            for process in processes:
                process.kill()
        found[count] = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_hear_each_other(results: Results, count: int) -> None:
    for result in results[count]:
        talk = result["talk"]
        assert talk["sum"].tolist() == [sum(range(1, count + 1)), 10 * count]
        assert talk["concat"][:, 0].tolist() == [r for r in range(count) for _ in range(r)]
        assert talk["concat"].shape[1] == 2
        assert talk["agree"] == [True, False]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ALIKE)
def test_the_number_of_ranks_changes_no_number(
    results: Results, tiny: ModuleType, one_thread: None, name: str, count: int
) -> None:
    alone = tiny.as_dict(tiny.train(tiny.config(**ALIKE[name])))
    together = results[count][0][name]
    assert together["status"] == alone["status"] == "complete"
    assert together["best_epoch"] == alone["best_epoch"]
    for metrics, expected in zip(together["curve"], alone["curve"], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5)
    assert together["best_metrics"] == pytest.approx(alone["best_metrics"], rel=1e-5)
    for key, value in alone["state"].items():
        torch.testing.assert_close(together["state"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_ranks_agree_and_the_first_alone_reports_and_keeps(
    results: Results, name: str, count: int
) -> None:
    first, *others = (result[name] for result in results[count])
    assert first["state"] is not None
    assert first["heard"]
    for other in others:
        assert other["state"] is None
        assert other["heard"] == []
        for key in ("status", "reason", "curve", "best_epoch", "best_value", "best_metrics"):
            assert other[key] == first[key]


@pytest.mark.parametrize("count", [2, 3])
def test_one_rank_is_told_to_stop_and_all_do(results: Results, count: int) -> None:
    for result in results[count]:
        assert result["stopped"]["status"] == "pruned"
        assert result["stopped"]["reason"] == "pruned at epoch 1"
        assert len(result["stopped"]["curve"]) == 1


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_go_on_from_a_checkpoint(results: Results, count: int) -> None:
    resumed, undisturbed = (results[count][0][name] for name in ("resumed", "undisturbed"))
    assert results[count][0]["first"]["heard"] == [1]
    assert resumed["heard"] == [1, 2, 3]
    assert resumed["curve"] == undisturbed["curve"]
    for key, value in undisturbed["state"].items():
        assert torch.equal(resumed["state"][key], value)


def test_one_process_needs_no_torch_distributed() -> None:
    model, rows = nn.Linear(2, 1), torch.arange(6.0).view(3, 2)
    assert ALONE.wrap(model) is model
    assert torch.equal(ALONE.sum(rows), rows)
    assert torch.equal(ALONE.concat(rows), rows)
    assert [ALONE.agree(True), ALONE.agree(False)] == [True, False]
