"""Compiled losses of a stack, and their gradients, equal the losses and autograd's.

Kernels compute in float32, so the oracle is asked in float64. H heads, B pictures, C classes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from core.kernels.losses import LOSS_KERNELS, PICTURES
from core.losses import LOSSES
from core.probing.stack_losses import CompiledLosses, DifferentiatedLosses, LossRun

B, C = 2 * PICTURES + 9, 7
CHOICES = {
    "gamma": [0.0, 0.5, 3.0],
    "gamma_positive": [0.0, 0.4, 2.0],
    "gamma_negative": [0.0, 0.4, 4.0],
    "clip": [0.0, 0.05, 0.9],
}


def _targets(num_pictures: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    targets_BC = (torch.rand(num_pictures, C, generator=generator) < 0.4).float()
    targets_BC[0] = 0  # a picture without labels
    return targets_BC


def _run(name: str, *, weighted: bool, start: int = 0) -> LossRun:
    """A head for every mixture of the loss' own settings, with and without smoothing."""
    names = ("label_smoothing", *LOSSES[name].parameters)
    choices = [[0.0, 0.3], *(CHOICES[n] for n in LOSSES[name].parameters)]
    rows = list(itertools.product(*choices))
    generator = torch.Generator().manual_seed(3)
    return LossRun(
        name=name,
        heads=slice(start, start + len(rows)),
        settings=dict(zip(names, torch.tensor(rows).unbind(1), strict=True)),
        class_weights_hC=torch.rand(len(rows), C, generator=generator) + 0.3 if weighted else None,
    )


def _in_float64(run: LossRun) -> LossRun:
    weights = run.class_weights_hC
    return LossRun(
        name=run.name,
        heads=run.heads,
        settings={name: value.double() for name, value in run.settings.items()},
        class_weights_hC=None if weights is None else weights.double(),
    )


def _logits(num_heads: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(num_heads, B, C, generator=generator)


class _Oracle(DifferentiatedLosses):
    """In float64."""

    def means(self, logits_HBC: Tensor, targets_BC: Tensor) -> Tensor:
        return torch.cat(
            [
                function(logits_HBC[heads].double(), targets_BC.double(), **settings).mean(1)
                for function, heads, settings in self._runs
            ]
        )


def test_every_loss_has_a_kernel() -> None:
    assert LOSS_KERNELS.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert LOSS_KERNELS[name].parameters == loss.parameters


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_autograd(name: str, weighted: bool, scale: float) -> None:
    """However sure the head."""
    run = _run(name, weighted=weighted)
    logits_HBC, targets_BC = _logits(run.heads.stop, scale), _targets()
    kept = logits_HBC.clone()
    expected_H, expected_HBC = _Oracle([_in_float64(run)]).slopes(logits_HBC, targets_BC)
    means_H, slopes_HBC = CompiledLosses([run], C).slopes(logits_HBC, targets_BC)
    torch.testing.assert_close(means_H, expected_H, rtol=2e-5, atol=1e-6)
    tolerance = 2e-6 / B
    torch.testing.assert_close(slopes_HBC, expected_HBC, rtol=1e-4, atol=tolerance)
    assert torch.equal(logits_HBC, kept)
    assert torch.equal(targets_BC, _targets())


def test_losses_side_by_side_write_to_their_own_heads() -> None:
    """Logits as a layer leaves them: not in the order of heads, in bfloat16."""
    runs: list[LossRun] = []
    for name in LOSSES:
        runs.append(_run(name, weighted=True, start=runs[-1].heads.stop if runs else 0))
    logits_HBC = _logits(runs[-1].heads.stop, 3.0).bfloat16().transpose(0, 1).contiguous()
    logits_HBC = logits_HBC.transpose(0, 1)
    expected = _Oracle([_in_float64(run) for run in runs]).slopes(logits_HBC, _targets())
    found = CompiledLosses(runs, C).slopes(logits_HBC, _targets())
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-6 / B)


@pytest.mark.parametrize("num_pictures", [1, 3, PICTURES])
@pytest.mark.parametrize("name", LOSSES)
def test_few_pictures(name: str, num_pictures: int) -> None:
    run = _run(name, weighted=False)
    logits_HBC = _logits(run.heads.stop, 2.0)[:, :num_pictures]
    expected = DifferentiatedLosses([run]).slopes(logits_HBC, _targets(num_pictures))
    found = CompiledLosses([run], C).slopes(logits_HBC, _targets(num_pictures))
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-6 / num_pictures)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_diverged_head_shows_in_its_own_loss_only(name: str, value: float) -> None:
    run = _run(name, weighted=False)
    logits_HBC = torch.zeros(run.heads.stop, 4, C)
    logits_HBC[1, 2, 3] = value
    targets_BC = _targets(4)
    targets_BC[2, 3] = 0.0 if value > 0 else 1.0  # an infinite mistake
    means_H, slopes_HBC = CompiledLosses([run], C).slopes(logits_HBC, targets_BC)
    others = [head for head in range(run.heads.stop) if head != 1]
    assert means_H[others].isfinite().all()
    assert slopes_HBC[others].isfinite().all()
    if value != value:
        assert means_H[1].isnan()
        assert slopes_HBC[1].isnan().any()
