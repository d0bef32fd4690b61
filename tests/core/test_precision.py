"""Which precision backbones are computed in."""

from __future__ import annotations

import pytest
import torch

from core.precision import BFLOAT16, FLOAT32, autocast, inference_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, BFLOAT16),
        ({"amx_bf16": True, "avx512_bf16": False}, BFLOAT16),
        ({"avx2": True, "avx512_bf16": False}, FLOAT32),
        ({}, FLOAT32),
    ],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert inference_precision("cpu") == expected


def test_a_gpu_computes_in_bfloat16() -> None:
    assert inference_precision("cuda") == BFLOAT16


@pytest.mark.parametrize(
    ("precision", "expected"), [(FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)]
)
def test_products_run_in_the_precision_that_is_named(precision: str, expected: torch.dtype) -> None:
    with autocast("cpu", precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
