"""Which pictures come when, to whom, and that reading ahead changes nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.finetuning.batches import (
    as_images,
    blocks_of_rank,
    cut_epoch,
    epoch_order,
    over_ranks,
    read_ahead,
    read_pictures,
    steps_per_epoch,
)
from core.finetuning.ranks import ALONE


@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    accumulation_steps=st.integers(1, 4),
    count=st.integers(1, 4),
)
def test_every_picture_counts_once_an_epoch(
    num_rows: int, batch_size: int, accumulation_steps: int, count: int
) -> None:
    order = np.random.default_rng(0).permutation(1000)[:num_rows]
    ranks = [
        cut_epoch(
            order,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            count=count,
        )
        for rank in range(count)
    ]
    batches = list(zip(*ranks, strict=True))  # every rank has as many
    together = [np.concatenate([cut.rows[: cut.num_own] for cut in batch]) for batch in batches]
    # The ranks' parts of a batch are the batch, whatever their number.
    whole = [order[start : start + batch_size] for start in range(0, num_rows, batch_size)]
    assert [rows.tolist() for rows in together] == [rows.tolist() for rows in whole]
    for batch in batches:
        assert all(len(cut.rows) == max(cut.num_own, 1) for cut in batch)
        sizes = [cut.num_own for cut in batch]
        assert max(sizes) - min(sizes) <= 1
        assert len({(c.batch, c.step, c.step_pictures, c.ends_step) for c in batch}) == 1
    steps: dict[int, list[int]] = {}
    for (first, *_), rows in zip(batches, together, strict=True):
        steps.setdefault(first.step, []).append(len(rows))
    assert len(steps) == steps_per_epoch(
        num_rows, batch_size=batch_size, accumulation_steps=accumulation_steps
    )
    for first, *_ in batches:
        parts = steps[first.step]
        assert first.step_pictures == sum(parts)
        assert len(parts) <= accumulation_steps
    ends = [first.batch for first, *_ in batches if first.ends_step]
    assert ends == [int(n) - 1 for n in np.cumsum([len(parts) for parts in steps.values()])]


def test_the_order_is_the_studys_and_changes_from_epoch_to_epoch() -> None:
    train = np.arange(100, 140)
    first = epoch_order(train, order_seed=3, epoch=1)
    assert sorted(first) == train.tolist()
    assert first.tolist() == epoch_order(train, order_seed=3, epoch=1).tolist()
    assert first.tolist() != epoch_order(train, order_seed=3, epoch=2).tolist()
    assert first.tolist() != epoch_order(train, order_seed=4, epoch=1).tolist()


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_reading_ahead_keeps_order_and_bounds(ahead: int) -> None:
    read: list[int] = []
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        read.append(item)
        return item * item

    for place, (item, square) in enumerate(read_ahead(range(10), work, ahead=ahead)):
        assert (item, square) == (place, place * place)
        time.sleep(0.002)
        assert len(read) <= place + 1 + ahead
    assert read == list(range(10))
    assert threads.isdisjoint({threading.get_ident()})
    assert list(read_ahead([], work)) == []


def test_what_a_read_raises_is_raised_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise OSError("the disk is gone")
        return item

    seen = []
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        for item, _ in read_ahead(range(5), work):
            seen.append(item)
    assert seen == [0, 1]
    assert threading.active_count() == before


def test_a_loop_that_ends_early_leaves_no_thread() -> None:
    before = threading.active_count()
    batches = read_ahead(range(100), lambda item: item)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_pictures_become_floats_in_channels_last_order() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
    rows = np.array([4, 1])
    images = as_images(read_pictures(pictures, rows, pin=False))
    assert images.shape == (2, 3, 5, 5)
    assert images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), pictures[rows] / 255, atol=1e-6)


@dataclass(frozen=True)
class _Rank:
    """One of several, whose `concat` gives its own part back."""

    rank: int
    count: int

    def concat(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 40])
def test_blocks_are_the_same_for_any_number_of_ranks(count: int, num_rows: int) -> None:
    pictures = np.arange(num_rows, dtype=np.uint8)[:, None]
    rows = np.random.default_rng(1).permutation(num_rows)
    blocks = [blocks_of_rank(rows, 8, _Rank(rank, count)) for rank in range(count)]
    expected = [b.tolist() for b in blocks_of_rank(rows, 8, ALONE)]
    assert [b.tolist() for part in blocks for b in part] == expected
    parts = [
        over_ranks(
            lambda block: block * 2,
            pictures,
            rows,
            block_size=8,
            ranks=_Rank(rank, count),  # type: ignore[arg-type]
            pin=False,
        )
        for rank in range(count)
    ]
    assert torch.cat(parts)[:, 0].tolist() == (rows * 2).tolist()
