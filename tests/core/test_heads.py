"""Heads: shapes, seeds, and csra against its definition. N pictures, D features, C classes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import InputError
from core.heads import HEADS, attend, build_head

N, D, C, SIDE = 6, 10, 4, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"dropout": 0.2},
    "mlp": {"dropout": 0.2, "hidden_sizes": (8, 5)},
    "csra": {"csra_lambda": 0.5, "csra_temperature": 2.0},
}


def _features(kind: str) -> torch.Tensor:
    shape = (N, D, SIDE, SIDE) if HEADS[kind].spatial else (N, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _build(kind: str, **settings: Any) -> nn.Module:
    return build_head(kind, num_features=D, num_classes=C, **{**SETTINGS[kind], **settings})


def test_every_head_is_covered() -> None:
    assert SETTINGS.keys() == HEADS.keys()


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_gives_one_logit_a_class(kind: str) -> None:
    head = _build(kind, seed=0)
    assert head.spatial == HEADS[kind].spatial
    logits_NC = head(_features(kind))
    assert logits_NC.shape == (N, C)
    logits_NC.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_seeded_weights_depend_on_the_seed_alone(kind: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = _build(kind, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = _build(kind, seed=3), _build(kind, seed=4)
    for (name, a), (_, b), (_, c) in zip(
        first.named_parameters(), again.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_without_a_seed_the_global_generator_is_used() -> None:
    torch.manual_seed(5)
    head = _build("linear")
    torch.manual_seed(5)
    assert torch.equal(head.layers[0].weight, nn.Linear(D, C).weight)


def test_seeded_weights_are_spread_as_torchs() -> None:
    head = build_head("mlp", num_features=400, num_classes=300, hidden_sizes=(200,), seed=0)
    for layer, fan_in in zip(head.layers, (400, 200), strict=True):
        bound = 1 / math.sqrt(fan_in)
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_mlp_is_a_chain_of_linear_and_relu() -> None:
    head = _build("mlp", seed=0).eval()
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise((D, 8, 5, C))]
    for ours, plain in zip(head.layers, layers, strict=True):
        plain.load_state_dict(ours.state_dict())
    plain = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    torch.testing.assert_close(head(_features("mlp")), plain(_features("mlp")))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    head, features = _build(kind, dropout=0.5, seed=0), _features(kind)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))


def test_csra_without_attention_is_linear_on_averaged_features() -> None:
    features_NDhw = _features("csra")
    csra = _build("csra", csra_lambda=0.0, seed=2)
    linear = build_head("linear", num_features=D, num_classes=C, seed=9)
    linear.load_state_dict(csra.state_dict())
    torch.testing.assert_close(csra(features_NDhw), linear(features_NDhw.mean((2, 3))))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 99.0])
def test_csra_is_its_definition(temperature: float) -> None:
    """Equations 2 to 5 of the paper, place by place."""
    head = _build("csra", csra_lambda=0.3, csra_temperature=temperature, seed=2)
    head.requires_grad_(False)
    features_NDhw = _features("csra")
    logits_NC = head(features_NDhw)
    weight_CD, bias_C = head.layers[0].weight, head.layers[0].bias
    for n, c in itertools.product(range(N), range(C)):
        scores = [
            float(features_NDhw[n, :, y, x] @ weight_CD[c] + bias_C[c])
            for y, x in itertools.product(range(SIDE), range(SIDE))
        ]
        if temperature == 99:
            attended = max(scores)
        else:
            shares = [math.exp(temperature * s) for s in scores]
            attended = sum(w * s for w, s in zip(shares, scores, strict=True)) / sum(shares)
        expected = sum(scores) / len(scores) + 0.3 * attended
        assert float(logits_NC[n, c]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_attention_with_a_temperature_each_is_attention_with_numbers() -> None:
    scores_PHC = torch.randn(7, 3, C, generator=torch.Generator().manual_seed(0))
    temperatures = [0.5, 20.0, 99.0]
    together = attend(scores_PHC, torch.tensor(temperatures).view(1, 3, 1), dim=0)
    for h, temperature in enumerate(temperatures):
        alone = attend(scores_PHC[:, h], temperature, dim=0)
        torch.testing.assert_close(together[h], alone)


def test_settings_of_other_heads_are_ignored_and_unknown_kinds_refused() -> None:
    head = build_head("linear", num_features=D, num_classes=C, hidden_sizes=(5,), csra_lambda=1.0)
    assert len(head.layers) == 1
    with pytest.raises(InputError, match=r"unknown head 'cnn'(.|\n)*csra, linear, mlp"):
        build_head("cnn", num_features=D, num_classes=C)
