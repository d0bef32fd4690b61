"""Whether an error says that memory ran out: of a GPU, or of this machine."""

from __future__ import annotations

import torch

MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")
"""What allocators say that have no exception of their own: torch's on Linux and on Windows, and
CUDA's libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's OutOfMemoryError, a MemoryError, and a RuntimeError that says as much."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in MESSAGES)


def first_line(error: BaseException) -> str:
    """What an error says, without the lines of hints behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
