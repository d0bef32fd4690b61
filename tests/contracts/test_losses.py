"""Every loss of the registry: shape, finiteness, gradient, and its published or torch's own form.

N pictures, H heads, C classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from core.config import CLASS_WEIGHTS, TrialConfig
from core.losses import LOSSES, asymmetric, bce, class_weights, cross_entropy, focal

N, C = 32, 6
DEFAULTS = TrialConfig(backbone="ffn")


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_NC = torch.randn(N, C, generator=generator, dtype=torch.float64) * 3
    targets_NC = (torch.rand(N, C, generator=generator) < 0.4).double()
    targets_NC[:, 0] = 1  # a label at least
    targets_NC[0] = 0  # but for the first picture
    return logits_NC.requires_grad_(), targets_NC


def _weights() -> Tensor:
    return torch.tensor([0.2, 0.5, 1.0, 1.0, 1.3, 2.0], dtype=torch.float64)


def _defaults(name: str) -> dict[str, float]:
    return {key: getattr(DEFAULTS, key) for key in LOSSES[name].parameters}


SHARED: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"class_weights_C": _weights()},
    {"label_smoothing": 0.3, "class_weights_C": _weights()},
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_finite_with_finite_gradient_however_sure_the_head(
    name: str, shared: dict[str, Any], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NC = scale * torch.randn(N, C, generator=generator).sign()
    logits_NC[:, -1] = 0
    logits_NC.requires_grad_()
    targets_NC = _data()[1].float()
    shared = {k: v.float() if isinstance(v, Tensor) else v for k, v in shared.items()}
    losses_N = LOSSES[name].function(logits_NC, targets_NC, **shared, **_defaults(name))
    assert losses_N.shape == (N,)
    assert losses_N.isfinite().all()
    assert (losses_N >= 0).all()
    losses_N.mean().backward()
    assert logits_NC.grad is not None
    assert logits_NC.grad.isfinite().all()
    assert logits_NC.grad.abs().sum() > 0


GAMMAS = [{"gamma": 0.0}, {"gamma": 0.5}, {"gamma_positive": 0.3, "gamma_negative": 0.5}]


@pytest.mark.parametrize("settings", GAMMAS, ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.05, 0.9])
def test_gradient_is_finite_for_small_exponents(settings: dict[str, float], clip: float) -> None:
    """0 ** gamma has an infinite derivative for gamma < 1."""
    logits_NC = torch.tensor([[-1e4, -30.0, 0.0, 30.0, 1e4]] * 2, requires_grad=True)
    targets_NC = torch.stack([torch.zeros(5), torch.ones(5)])
    if "gamma" in settings:
        losses_N = focal(logits_NC, targets_NC, **settings)
    else:
        losses_N = asymmetric(logits_NC, targets_NC, clip=clip, **settings)
    losses_N.sum().backward()
    assert losses_N.isfinite().all()
    assert logits_NC.grad is not None
    assert logits_NC.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_picture_without_labels(name: str) -> None:
    """It teaches all but the softmax loss that nothing is there."""
    logits_NC, targets_NC = _data()
    assert targets_NC[0].sum() == 0
    for smoothing in (0.0, 0.2):
        losses_N = LOSSES[name].function(
            logits_NC, targets_NC, label_smoothing=smoothing, **_defaults(name)
        )
        (grad_NC,) = torch.autograd.grad(losses_N.sum(), logits_NC)
        if name == "cross_entropy":
            assert losses_N[0] == 0
            assert (grad_NC[0] == 0).all()
        else:
            assert losses_N[0] > 0
            assert (grad_NC[0] != 0).any()
        assert losses_N.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_setting_each_equals_plain_numbers(name: str) -> None:
    """Parameters [H, 1] and class weights [H, C] give each head what numbers give it alone."""
    generator = torch.Generator().manual_seed(1)
    logits_NHC = torch.randn(N, 3, C, generator=generator)
    targets_NC = _data()[1].float()
    smoothing_H = torch.tensor([0.0, 0.1, 0.4])
    weights_HC = torch.rand(3, C, generator=generator) + 0.5
    values = {
        "gamma": [0.0, 0.7, 3.0],
        "gamma_positive": [0.0, 1.0, 2.0],
        "gamma_negative": [4.0, 0.5, 0.0],
        "clip": [0.0, 0.05, 0.2],
    }
    settings = {key: torch.tensor(values[key]) for key in LOSSES[name].parameters}
    together_NH = LOSSES[name].function(
        logits_NHC,
        targets_NC.unsqueeze(1),
        label_smoothing=smoothing_H.unsqueeze(1),
        class_weights_C=weights_HC,
        **{key: value.unsqueeze(1) for key, value in settings.items()},
    )
    assert together_NH.shape == (N, 3)
    for h in range(3):
        alone_N = LOSSES[name].function(
            logits_NHC[:, h],
            targets_NC,
            label_smoothing=float(smoothing_H[h]),
            class_weights_C=weights_HC[h],
            **{key: float(value[h]) for key, value in settings.items()},
        )
        torch.testing.assert_close(together_NH[:, h], alone_N)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights_C", [None, _weights()], ids=["even", "weighted"])
def test_bce_is_torchs(smoothing: float, weights_C: Tensor | None) -> None:
    logits_NC, targets_NC = _data()
    oracle = torch.nn.BCEWithLogitsLoss(pos_weight=weights_C)
    smoothed_NC = targets_NC * (1 - smoothing) + smoothing / 2
    ours = bce(logits_NC, targets_NC, label_smoothing=smoothing, class_weights_C=weights_C).mean()
    torch.testing.assert_close(ours, oracle(logits_NC, smoothed_NC))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights_C", [None, _weights()], ids=["even", "weighted"])
def test_cross_entropy_is_torchs(smoothing: float, weights_C: Tensor | None) -> None:
    logits_NC, targets_NC = (values[1:] for values in _data())  # all with a label
    shares_NC = targets_NC / targets_NC.sum(1, keepdim=True)
    ours_N = cross_entropy(
        logits_NC, targets_NC, label_smoothing=smoothing, class_weights_C=weights_C
    )
    oracle_N = F.cross_entropy(
        logits_NC, shares_NC, weight=weights_C, label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(ours_N, oracle_N)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_is_torchvisions(gamma: float) -> None:
    logits_NC, targets_NC = _data()
    ours_N = focal(logits_NC, targets_NC, gamma=gamma)
    oracle_NC = sigmoid_focal_loss(logits_NC, targets_NC, alpha=-1, gamma=gamma)
    torch.testing.assert_close(ours_N, oracle_NC.mean(1))


def _authors_asymmetric(
    x: Tensor, y: Tensor, gamma_neg: float, gamma_pos: float, clip: float, eps: float = 1e-8
) -> Tensor:
    """AsymmetricLoss.forward of github.com/Alibaba-MIIL/ASL, without its gradient switch and with
    the classes left apart."""
    xs_pos = torch.sigmoid(x)
    xs_neg = 1 - xs_pos
    if clip > 0:
        xs_neg = (xs_neg + clip).clamp(max=1)
    loss = y * torch.log(xs_pos.clamp(min=eps)) + (1 - y) * torch.log(xs_neg.clamp(min=eps))
    pt = xs_pos * y + xs_neg * (1 - y)
    one_sided_gamma = gamma_pos * y + gamma_neg * (1 - y)
    return -loss * torch.pow(1 - pt, one_sided_gamma)


@pytest.mark.parametrize(
    ("gamma_negative", "gamma_positive", "clip"),
    [(4.0, 1.0, 0.05), (4.0, 0.0, 0.05), (2.0, 2.0, 0.0), (0.0, 0.0, 0.0), (4.0, 1.0, 0.5)],
)
def test_asymmetric_is_the_authors(
    gamma_negative: float, gamma_positive: float, clip: float
) -> None:
    logits_NC, targets_NC = _data()
    ours_N = asymmetric(
        logits_NC,
        targets_NC,
        gamma_positive=gamma_positive,
        gamma_negative=gamma_negative,
        clip=clip,
    )
    oracle_N = _authors_asymmetric(
        logits_NC, targets_NC, gamma_negative, gamma_positive, clip
    ).mean(1)
    torch.testing.assert_close(ours_N, oracle_N)
    ours, oracle = (torch.autograd.grad(v.sum(), logits_NC)[0] for v in (ours_N, oracle_N))
    torch.testing.assert_close(ours, oracle)


def test_without_focusing_the_family_is_bce() -> None:
    """With smoothing and class weights, too: they mean the same in all three."""
    logits_NC, targets_NC = _data()
    for shared in SHARED:
        expected = bce(logits_NC, targets_NC, **shared)
        torch.testing.assert_close(focal(logits_NC, targets_NC, gamma=0.0, **shared), expected)
        plain = {"gamma_positive": 0.0, "gamma_negative": 0.0, "clip": 0.0}
        torch.testing.assert_close(asymmetric(logits_NC, targets_NC, **plain, **shared), expected)


def test_class_weights_follow_the_training_frequencies() -> None:
    targets_NC = torch.zeros(100, 4)
    for label, count in enumerate((64, 16, 1, 0)):
        targets_NC[:count, label] = 1
    assert class_weights("none", targets_NC) is None
    for kind, ratio in (("inverse", 4.0), ("sqrt_inverse", 2.0)):
        weights_C = class_weights(kind, targets_NC)
        assert weights_C is not None
        assert weights_C.mean().item() == pytest.approx(1)
        assert (weights_C[1] / weights_C[0]).item() == pytest.approx(ratio)
        assert weights_C[3] == weights_C[2]  # no positive counts as one
    assert set(CLASS_WEIGHTS) == {"none", "inverse", "sqrt_inverse"}
