"""In which precision backbones, and the products of a head's step, are computed.

bfloat16 where the device multiplies it in hardware, on CPUs with AVX512-BF16 or AMX and on GPUs.
Elsewhere it is emulated and slower, so float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
_CPU_FEATURES = ("avx512_bf16", "amx_bf16")


def inference_precision(device_type: str) -> str:
    """The faster of FLOAT32 and BFLOAT16 on `cpu` (this machine's) or `cuda`.

    Decided once a study, as features of unlike precision do not mix. GPUs are taken to have
    bfloat16 (NVIDIA's have since 2020), since the process that decides may not have one.
    """
    if device_type == "cuda":
        return BFLOAT16
    capabilities = torch.cpu.get_capabilities()
    return BFLOAT16 if any(capabilities.get(f, False) for f in _CPU_FEATURES) else FLOAT32


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager[None]:
    """Within it, products and convolutions run in `precision`."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == BFLOAT16)


def product_type(precision: str) -> torch.dtype:
    """In which products are computed under `autocast`."""
    return torch.bfloat16 if precision == BFLOAT16 else torch.float32


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Within it, what this thread computes on a CPU is zero where it would be smaller than normal
    numbers are, 1e-38 in float32.

    Weights that decay and get no gradient (of a ReLU that never opens) go through them, and a CPU
    takes many times as long for each.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
