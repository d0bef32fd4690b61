"""Which pictures are trained on when, by which rank, and how they come onto the device.

Pictures are uint8, usually a memory map: the next batches are read in a thread while one is
trained on, so that the disk is never waited for, and become floats on the device. The order of an
epoch is the study's: a function of its seed and the epoch, nothing to be kept.
B pictures of a batch, s their side in pixels, C classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..encoding.inputs import Rows
from ..images.pixels import Pictures
from .ranks import Ranks

AHEAD = 2
"""Batches that are read before they are asked for."""

Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One rank's part of one batch of an epoch."""

    rows: Rows
    """Its pictures; one picture that does not count where the batch has too few for this rank, as
    every rank passes the model as often as the others."""
    num_own: int
    """How many of `rows` count: all or none."""
    batch: int
    """Place of the batch in the epoch, from 0."""
    step: int
    """Place in the epoch of the optimizer's step that it is a part of, from 0."""
    step_pictures: int
    """Pictures of that step, over its batches and all ranks."""
    ends_step: bool
    """Whether it is the last batch of the step."""


def steps_per_epoch(num_rows: int, *, batch_size: int, accumulation_steps: int) -> int:
    """Steps of the optimizer in an epoch; the last may have fewer pictures."""
    return -(-num_rows // (batch_size * accumulation_steps))


def cut_epoch(
    order: Rows, *, batch_size: int, accumulation_steps: int, rank: int = 0, count: int = 1
) -> list[Cut]:
    """This rank's part of every batch of an epoch, in order.

    Over the ranks, each row counts once. A batch is shared evenly, the first ranks taking what is
    over; it is the same batch for any number of ranks, and so is the step.
    """
    cuts = []
    step_size = batch_size * accumulation_steps
    for batch, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        own = np.array_split(rows, count)[rank]
        step = start // step_size
        end = min((step + 1) * step_size, len(order))
        cuts.append(
            Cut(
                rows=own if len(own) else rows[:1],
                num_own=len(own),
                batch=batch,
                step=step,
                step_pictures=end - step * step_size,
                ends_step=start + len(rows) == end,
            )
        )
    return cuts


def epoch_order(train: Rows, *, order_seed: int, epoch: int) -> Rows:
    """The training rows in the order of an epoch (counted from 1)."""
    return np.random.default_rng([order_seed, epoch]).permutation(train)


def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Read], *, ahead: int = AHEAD
) -> Iterator[tuple[Item, Read]]:
    """Each item with what `read` gives for it, the next ones read in a thread meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        waiting = iter(items)
        pending = deque((item, reader.submit(read, item)) for item in islice(waiting, ahead))
        while pending:
            item, result = pending.popleft()
            ready = result.result()
            for following in islice(waiting, 1):
                pending.append((following, reader.submit(read, following)))
            yield item, ready


def read_pictures(pictures: Pictures, rows: Rows, *, pin: bool) -> Tensor:
    """Pictures as uint8 [B, s, s, 3] in memory, pinned for a copy that nobody waits for."""
    block = torch.from_numpy(np.ascontiguousarray(pictures[rows]))
    return block.pin_memory() if pin else block


def as_images(block_Bss3: Tensor) -> Tensor:
    """uint8 [B, s, s, 3] to float [B, 3, s, s] in 0..1, in channels-last order."""
    return to_unit(block_Bss3.permute(0, 3, 1, 2))


def to_unit(images_B3ss: Tensor) -> Tensor:
    """uint8 in 0..255 to float in 0..1."""
    return images_B3ss.float().div_(255)


def blocks_of_rank(rows: Rows, size: int, ranks: Ranks) -> list[Rows]:
    """This rank's blocks of at most `size` rows. Over the ranks, in rank order, they are the same
    blocks for any number of ranks."""
    starts = np.array_split(np.arange(0, len(rows), size), ranks.count)[ranks.rank]
    return [rows[start : start + size] for start in starts]


def over_ranks(
    compute: Callable[[Tensor], Tensor],
    pictures: Pictures,
    rows: Rows,
    *,
    block_size: int,
    ranks: Ranks,
    pin: bool,
) -> Tensor:
    """What `compute` gives for blocks of pictures [B, s, s, 3], each rank doing a part: one row a
    picture, in the order of `rows`, on all ranks."""
    own = blocks_of_rank(rows, block_size, ranks)
    # A rank without a block computes one picture for its shape alone.
    blocks = read_ahead(own or [rows[:1]], lambda block: read_pictures(pictures, block, pin=pin))
    parts = torch.cat([compute(images) for _, images in blocks])
    return ranks.concat(parts[: sum(map(len, own))])
