"""Several forward passes of one frozen network side by side on a CPU.

Torch shares the work of one pass among its threads operation by operation, and they wait for each
other after each. Batches that go through the network in streams of their own, of one thread each on
a small machine, wait for nobody (`bench_extraction.py`), and a stream decodes its pictures while
the others compute. On other devices there is one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from .encoders import Encoder

MAX_STREAMS = 4
"""Each holds the activations of a batch of its own; more threads than these share a stream."""


def num_streams(encoder: Encoder, device: torch.device | str) -> int:
    """How many batches go through the encoder side by side on `device`. What torch does not compute
    (ONNX) has threads of its own."""
    if torch.device(device).type != "cpu" or not encoder.backbone.trainable:
        return 1
    return max(1, min(MAX_STREAMS, torch.get_num_threads()))


@contextmanager
def streams(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads, one a stream, that have torch's own threads shared out among them. What waits for a
    stream when the block is left by an exception is dropped."""
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(
        count, initializer=torch.set_num_threads, initargs=(max(1, num_threads // count),)
    ) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)  # What a thread sets is what later ones start with.
