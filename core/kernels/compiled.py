"""How kernels are compiled: once a machine, kept beside the code, free of Python's lock.

Numba finds a kept kernel out of date when the file changes that it stands in, not when one does
that it imports from. So a kernel and the functions that it calls share a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

# Sums keep their order, and NaN and infinity their meaning: a head that diverges has to show.
_FASTMATH = {"contract", "nsz", "arcp", "afn"}


def compiled(function: F) -> F:
    """The function as machine code, which is made when it is first called with such types."""
    try:
        kernel = _kernel(function, cache=True)
    except RuntimeError:  # There is no folder to keep it in: each process makes its own.
        kernel = _kernel(function, cache=False)
    return cast(F, kernel)


def _kernel(function: F, *, cache: bool) -> Any:
    return numba.njit(cache=cache, nogil=True, error_model="numpy", fastmath=_FASTMATH)(function)
