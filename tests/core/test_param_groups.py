"""Learning rates and weight decay of each parameter."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from core.finetuning.param_groups import build_optimizer, parameter_groups
from core.optimizers import OPTIMIZERS


def _stages() -> list[nn.Module]:
    return [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 4), nn.Linear(4, 4)]


def test_rates_fall_from_the_head_to_the_input() -> None:
    stages, head = _stages(), nn.Linear(4, 2)
    groups = parameter_groups(
        stages, head, lr=0.1, layer_lr_decay=0.5, head_lr_multiplier=3, weight_decay=0.01
    )
    found = {id(p): g for g in groups for p in g["params"]}
    for part, rate in zip([*stages, head], [0.025, 0.05, 0.1, 0.3], strict=True):
        for parameter in part.parameters():
            assert found[id(parameter)]["peak"] == pytest.approx(rate)
            expected = 0.01 if parameter.ndim > 1 else 0.0
            assert found[id(parameter)]["weight_decay"] == expected
    assert len(found) == sum(len(list(p.parameters())) for p in [*stages, head])


def test_norms_and_biases_of_any_shape_are_not_decayed() -> None:
    """Of real networks, by the names that their authors gave."""
    networks = {
        "swin_t": torchvision.models.swin_t(),
        "convnext_tiny": torchvision.models.convnext_tiny(),
        "efficientnet_b0": torchvision.models.efficientnet_b0(),
    }
    networks["plane"] = nn.Sequential(nn.LayerNorm([4, 4]), nn.Conv2d(1, 2, 3))  # type: ignore[assignment]
    for name, network in networks.items():
        groups = parameter_groups([network], nn.Linear(2, 2), lr=1, weight_decay=1)
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        names = {n for n, p in network.named_parameters() if id(p) in decayed}
        assert names, name
        assert not any("bias" in n for n in names)
        for n in names:
            module = network.get_submodule(n.rpartition(".")[0])
            assert not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)), n
            assert network.get_parameter(n).ndim > 1


def test_a_shared_parameter_is_in_one_group() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    groups = parameter_groups([first, second], nn.Linear(2, 1), lr=0.1, layer_lr_decay=0.5)
    all_params = [id(p) for g in groups for p in g["params"]]
    assert len(all_params) == len(set(all_params)) == 5


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_takes_the_groups(kind: str) -> None:
    settings = {
        "momentum": 0.9,
        "nesterov": False,
        "beta1": 0.8,
        "beta2": 0.9,
        "alpha": 0.9,
        "unread": 1,
    }
    groups = parameter_groups([nn.Linear(2, 2)], nn.Linear(2, 1), lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(kind, groups, lr=0.1, settings=settings)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0, 0.5, 0.0]
    assert [g["peak"] for g in optimizer.param_groups] == [0.1] * 4
    assert "unread" not in optimizer.param_groups[0]
    optimizer.step()
    torch.optim.Optimizer.load_state_dict(optimizer, optimizer.state_dict())
