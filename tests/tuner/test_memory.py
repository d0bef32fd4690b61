"""Whether a batch fits, asked before training: measured once, kept, the same on every rank."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import core.finetuning.step_memory
from core.config import TrialConfig
from core.errors import InputError
from core.finetuning.memory import MemoryModel
from core.finetuning.ranks import ALONE
from tuner.home import open_home
from tuner.trials import memory
from tuner.trials.context import Context
from tuner.trials.memory import memory_model, too_big

from ..contexts import drawn_table, small_context

CPU = torch.device("cpu")
CONFIG = TrialConfig(mode="finetune", backbone="squeezenet1_1", image_size=32, unfrozen_stages=2)
LINE = MemoryModel(fixed_bytes=10_000_000, bytes_per_picture=1_000_000, update_bytes=0)
"""With 123.75 MB, of which four fifths are planned for, 89 pictures fit."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return drawn_table(tmp_path_factory.mktemp("memory"), 120, (48, 48))


@pytest.fixture
def context(table: Any, tmp_path: Path) -> Context:
    return small_context(table, tmp_path, memory_bytes=123_750_000)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[TrialConfig]:
    """What is measured, in place of measuring it."""
    asked: list[TrialConfig] = []

    def step_memory(encoder: Any, config: TrialConfig, **_: Any) -> MemoryModel:
        asked.append(config)
        return LINE

    monkeypatch.setattr(core.finetuning.step_memory, "step_memory", step_memory)
    return asked


class Pair:
    """One rank of two; the other has so much room."""

    count = 2

    def __init__(self, rank: int, *, other_room: int, measured: bool = True) -> None:
        self.rank, self._other_room, self._measured = rank, other_room, measured

    def concat(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.tensor([self._other_room])])

    def agree(self, value: bool) -> bool:
        return value if self.rank == 0 else self._measured

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    wrap: Any = None


def _config(batch_size: int, **changes: Any) -> TrialConfig:
    return dataclasses.replace(CONFIG, batch_size=batch_size, **changes)


def test_the_largest_batch_fits_and_one_more_does_not(
    context: Context, measured: list[TrialConfig]
) -> None:
    assert too_big(context, _config(89), device=CPU, ranks=ALONE) is None
    reason = too_big(context, _config(90), device=CPU, ranks=ALONE)
    assert reason == (
        "a batch of 90 does not fit in memory: at most 89 pictures fit with squeezenet1_1 at 32 px "
        "and 0.1 GB for each worker"
    )


def test_a_batch_is_shared_by_the_workers_and_the_least_room_counts(
    context: Context, measured: list[TrialConfig]
) -> None:
    wide = Pair(0, other_room=10**12)
    assert too_big(context, _config(178), device=CPU, ranks=wide) is None
    reason = too_big(context, _config(179), device=CPU, ranks=wide)
    assert reason is not None and "at most 178 pictures fit on 2 workers" in reason
    narrow = Pair(0, other_room=25_100_000)
    assert too_big(context, _config(20), device=CPU, ranks=narrow) is None
    assert too_big(context, _config(21), device=CPU, ranks=narrow) is not None


def test_not_even_one(context: Context, measured: list[TrialConfig]) -> None:
    context = dataclasses.replace(context, memory_bytes=11_000_000)
    reason = too_big(context, _config(1), device=CPU, ranks=ALONE)
    assert reason is not None and "not one picture fits" in reason


def test_each_shape_of_step_is_measured_once(context: Context, measured: list[TrialConfig]) -> None:
    alike = [_config(8), _config(64, lr=0.5, epochs=3), _config(8, mixup_alpha=0.2, seed=5)]
    for config in alike:
        memory_model(context, config, device=CPU, ranks=ALONE)
    assert len(measured) == 1
    unlike = [
        _config(8, image_size=64), _config(8, unfrozen_stages=3), _config(8, unfrozen_stages=None),
        _config(8, ema_decay=0.9), _config(8, batch_norm="train"), _config(8, optimizer="sgd"),
        _config(8, backbone="mobilenet_v2"), _config(8, head="mlp", hidden_sizes=(512,)),
    ]  # fmt: skip
    for number, config in enumerate(unlike, 2):
        memory_model(context, config, device=CPU, ranks=ALONE)
        assert len(measured) == number
    other = dataclasses.replace(context, precision="bfloat16")
    memory_model(other, CONFIG, device=CPU, ranks=ALONE)
    assert len(measured) == len(unlike) + 2


def test_the_cache_says_what_was_measured(context: Context, measured: list[TrialConfig]) -> None:
    memory_model(context, CONFIG, device=CPU, ranks=ALONE)
    (path,) = (context.cache / "memory").iterdir()
    kept = json.loads(path.read_text())
    assert kept["step"]["backbone"] == "squeezenet1_1" and kept["step"]["device"] == "cpu"
    assert MemoryModel(**kept["model"]) == LINE


def test_only_rank_0_measures(context: Context, measured: list[TrialConfig]) -> None:
    waiting = Pair(1, other_room=10**12, measured=False)
    reason = too_big(context, _config(8), device=CPU, ranks=waiting)
    assert reason is not None and "not one picture fits" in reason
    assert measured == []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_measurement_that_does_not_fit_is_not_kept(
    context: Context, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def step_memory(*_: Any, **__: Any) -> MemoryModel:
        raise error

    monkeypatch.setattr(core.finetuning.step_memory, "step_memory", step_memory)
    assert too_big(context, _config(2), device=CPU, ranks=ALONE) is not None
    assert not list(context.cache.glob("memory/*"))


def test_other_errors_come_through(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def step_memory(*_: Any, **__: Any) -> MemoryModel:
        raise InputError("cannot be trained")

    monkeypatch.setattr(core.finetuning.step_memory, "step_memory", step_memory)
    with pytest.raises(InputError, match="cannot be trained"):
        too_big(context, _config(2), device=CPU, ranks=ALONE)


def test_room_is_a_share_of_what_is_free(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    import core.finetuning.memory

    monkeypatch.setattr(core.finetuning.memory, "available_memory", lambda device: 1000)
    free = dataclasses.replace(context, memory_bytes=None)
    assert memory._room(free, CPU) == 1000
    assert memory._room(dataclasses.replace(free, memory_share=0.25), CPU) == 250
    assert memory._room(context, CPU) == 123_750_000


def test_a_real_measurement_grows_with_pictures_and_stages(context: Context) -> None:
    torch.set_num_threads(1)
    small, wide, deep = (
        memory_model(context, config, device=CPU, ranks=ALONE)
        for config in (CONFIG, _config(8, image_size=64), _config(8, unfrozen_stages=None))
    )
    assert small is not None and wide is not None and deep is not None
    # Four times the pixels, and every layer's activations in place of the last two stages'.
    assert wide.bytes_per_picture > 2 * small.bytes_per_picture
    assert deep.bytes_per_picture > small.bytes_per_picture
    # Never less than the weights: 1.2 million parameters of 4 bytes, all kept for the best epoch.
    assert small.fixed_bytes > 2 * 722_496 * 4


@pytest.mark.parametrize("text, expected", [("", None), ("1.5", 1_500_000_000), ("0", 0)])
def test_a_person_may_set_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None
) -> None:
    monkeypatch.setenv("TUNER_MEMORY_GB", text)
    assert open_home(tmp_path / "home").memory_limit == expected


@pytest.mark.parametrize("text", ["lots", "-1", "nan", "inf"])
def test_a_limit_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TUNER_MEMORY_GB", text)
    with pytest.raises(InputError, match=r"TUNER_MEMORY_GB.*gigabytes"):
        open_home(tmp_path / "home")
