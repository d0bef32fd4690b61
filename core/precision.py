"""In which precision a frozen backbone is computed.

bfloat16 where the device multiplies it in hardware: on CPU cores with AVX512-BF16 it took a third
of the time of float32 (MobileNetV2, both in channels-last order), and heads trained on either
score alike. Elsewhere it is emulated and slower, so float32.
"""

from __future__ import annotations

import contextlib

import torch

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
_CPU_FEATURES = ("avx512_bf16", "amx_bf16")


def inference_precision(device: torch.device | str) -> str:
    """The faster of FLOAT32 and BFLOAT16 on this device."""
    if torch.device(device).type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = any(capabilities.get(feature, False) for feature in _CPU_FEATURES)
    return BFLOAT16 if supported else FLOAT32


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager[None]:
    """Within it, products and convolutions run in `precision`."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == BFLOAT16)
