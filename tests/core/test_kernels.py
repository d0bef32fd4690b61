"""Kernels are compiled once: with the types that stacks give them, and not while heads train."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from core.config import TrialConfig
from core.heads import HEADS
from core.kernels.compiled import compiled
from core.kernels.losses import LOSS_KERNELS
from core.kernels.ranks import find_hits
from core.kernels.ready import load_kernels
from core.kernels.updates import UPDATE_KERNELS
from core.losses import LOSSES
from core.optimizers import OPTIMIZERS
from core.precision import BFLOAT16, FLOAT32
from core.probing.probe import train_probes

N, D, C = 60, 6, 4


def _kernels() -> list[Any]:
    functions = [kernel.function for kernel in LOSS_KERNELS.values()]
    return [*functions, *(kernel.function for kernel in UPDATE_KERNELS.values()), find_hits]


def test_every_optimizer_has_a_kernel() -> None:
    assert UPDATE_KERNELS.keys() == OPTIMIZERS.keys()
    for name, optimizer in OPTIMIZERS.items():
        kernel = UPDATE_KERNELS[name]
        assert (kernel.parameters, kernel.num_slots) == (optimizer.parameters, optimizer.num_slots)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("head", HEADS)
def test_nothing_is_compiled_while_heads_train(head: str, precision: str) -> None:
    load_kernels()
    before = [len(kernel.signatures) for kernel in _kernels()]
    assert all(before)
    rng = np.random.default_rng(0)
    shape = (N, 4, D) if HEADS[head].spatial else (N, D)
    configs = [
        TrialConfig(
            backbone="ffn",
            head=head,
            hidden_sizes=(5,) if head == "mlp" else (),
            loss=loss,
            optimizer=optimizer,
            class_weights="inverse" if loss == "bce" else "none",
            epochs=2,
            batch_size=16,
        )
        for loss, optimizer in itertools.product(LOSSES, OPTIMIZERS)
    ]
    rows = np.arange(N)
    outcomes = train_probes(
        rng.standard_normal(shape, dtype=np.float32),
        torch.from_numpy((rng.random((N, C)) < 0.4).astype(np.float32)),
        [(rows[:45], rows[45:])],
        configs,
        precision=precision,
        keep_state=True,
    )
    assert all(outcome.best_metrics for outcome in outcomes)
    assert [len(kernel.signatures) for kernel in _kernels()] == before


def test_a_weight_that_decays_becomes_zero_and_never_a_denormal() -> None:
    """An MLP whose first layer gets no gradient. The smallest denormal, times 0.7, is itself."""
    rows = np.arange(N)
    config = TrialConfig(
        backbone="ffn",
        head="mlp",
        hidden_sizes=(8,),
        loss="bce",
        optimizer="adamw",
        lr=0.3,
        weight_decay=1.0,
        schedule="constant",
        warmup_fraction=0.0,
        epochs=120,
        batch_size=16,
    )
    (outcome,) = train_probes(
        np.zeros((N, D), np.float32),
        torch.ones(N, C),
        [(rows[:45], rows[45:])],
        [config],
        keep_state=True,
        last_epoch=120,
    )
    assert outcome.state is not None
    weights = outcome.state["layers.0.weight"].abs()
    assert (weights == 0).all()
    # The thread computes with denormals again.
    assert torch.tensor(1e-30) * torch.tensor(1e-10) > 0


def test_a_kernel_that_cannot_be_kept_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the code is not to be written beside, nor anything in the person's home."""

    def nowhere(self: object, py_func: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.core.caching.FunctionCache.__init__", nowhere)

    def double(x: float) -> float:
        return 2 * x

    assert compiled(double)(3.0) == 6.0
