"""Averages of weights against torch's own AveragedModel."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.finetuning.ema import AveragedWeights


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()


def test_it_is_torchs_average_of_weights_and_buffers() -> None:
    model = _model()
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    average = AveragedWeights(model, 0.8, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        _step(model, optimizer)
        oracle.update_parameters(model)
        average.update()
    live = copy.deepcopy(model.state_dict())
    with average.applied():
        for name, value in oracle.module.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(model.state_dict()[name], value)
                assert not torch.equal(live[name], value)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in live.items())


def test_the_weights_come_back_when_evaluation_fails() -> None:
    model = _model()
    average = AveragedWeights(model, 0.9, list(model.parameters()))
    average.update()
    _step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    live = copy.deepcopy(model.state_dict())
    try:
        with average.applied():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in live.items())


def test_it_goes_on_from_its_state() -> None:
    model = _model()
    first = AveragedWeights(model, 0.8, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    second = AveragedWeights(model, 0.8, list(model.parameters()))
    for step in range(4):
        _step(model, optimizer)
        first.update()
        if step == 1:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        elif step > 1:
            second.update()
    pairs = zip(first.state_dict()["averages"], second.state_dict()["averages"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
