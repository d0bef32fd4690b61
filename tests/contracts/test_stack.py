"""A head trained in a stack equals the same head trained alone by torch.optim.

The plain loop below is the oracle: a module from `core.heads`, a loss with plain numbers, torch's
optimizer, the same batches. N pictures, D features, P places, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import TrialConfig
from core.head_settings import head_settings
from core.heads import HEADS, build_head
from core.losses import LOSSES, class_weights
from core.optimizers import OPTIMIZERS
from core.precision import BFLOAT16
from core.probing.stack import HeadStack
from core.schedules import SCHEDULES, rate_factors

N, D, P, C, BATCH, EPOCHS = 48, 12, 4, 5, 16, 4

HEAD_SETTINGS = {
    "linear": {"head": "linear"},
    "mlp": {"head": "mlp", "hidden_sizes": (7, 6)},
    "csra": {"head": "csra", "csra_lambda": 0.7, "csra_temperature": 3.0},
}
OPTIMIZER_SETTINGS = {
    "sgd": [
        {"lr": 0.5, "weight_decay": 0.01},
        {"lr": 0.2, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1},
    ],
    "adam": [{"lr": 0.02, "beta1": 0.8, "weight_decay": 0.1}, {"lr": 0.1, "beta2": 0.95}],
    "adamw": [{"lr": 0.02, "beta2": 0.99, "weight_decay": 0.5}, {"lr": 0.05, "beta1": 0.5}],
    "rmsprop": [{"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}, {"lr": 0.02}],
}
LOSS_SETTINGS = {
    "bce": [{}, {"label_smoothing": 0.1}, {"class_weights": "inverse"}],
    "cross_entropy": [{}, {"label_smoothing": 0.2, "class_weights": "sqrt_inverse"}],
    "focal": [{"gamma": 0.5}, {"gamma": 3.0, "label_smoothing": 0.1}],
    "asymmetric": [{}, {"gamma_negative": 2.0, "gamma_positive": 0.0, "clip": 0.0}],
}


def _data(spatial: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (N, P, D) if spatial else (N, D)
    features = torch.randn(shape, generator=generator)
    targets_NC = (torch.rand(N, C, generator=generator) < 0.35).float()
    return features, targets_NC


def _batches(epochs: int) -> list[Tensor]:
    rng = np.random.default_rng(3)
    return [
        torch.from_numpy(order[start : start + BATCH])
        for order in (rng.permutation(N) for _ in range(epochs))
        for start in range(0, N, BATCH)
    ]


def _train_alone(
    config: TrialConfig, products: contextlib.AbstractContextManager[None] | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses before each step and final weights of one head, by torch.optim; `products` is the
    context of its forward passes."""
    spatial = HEADS[config.head].spatial
    features, targets_NC = _data(spatial)
    head = build_head(num_features=D, num_classes=C, **head_settings(config))
    weights = [p for n, p in head.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in head.named_parameters() if n.endswith("bias")]
    kind = OPTIMIZERS[config.optimizer]
    optimizer = kind.build(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        **{k: getattr(config, k) for k in kind.parameters},
    )
    loss = LOSSES[config.loss]
    steps = _batches(config.epochs)
    factors = rate_factors(
        config.schedule, num_steps=len(steps), warmup_fraction=config.warmup_fraction
    )
    losses = []
    for rows, factor in zip(steps, factors, strict=True):
        x = features[rows]
        if spatial:  # the module reads maps [N, D, h, w]
            x = x.transpose(1, 2).unflatten(2, (2, 2))
        with products or contextlib.nullcontext():
            logits = head(x).float()
        value = loss.function(
            logits,
            targets_NC[rows],
            label_smoothing=config.label_smoothing,
            class_weights_C=class_weights(config.class_weights, targets_NC),
            **{k: getattr(config, k) for k in loss.parameters},
        ).mean()
        losses.append(value.item())
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return losses, head.state_dict()


def _train_stack(
    configs: list[TrialConfig], *, compiled: bool | None = None
) -> tuple[HeadStack, list[list[float]]]:
    features, targets_NC = _data(HEADS[configs[0].head].spatial)
    stack = HeadStack(
        configs,
        num_features=D,
        train_targets_NC=targets_NC,
        steps_per_epoch=-(-N // BATCH),
        compiled=compiled,
    )
    losses: list[list[float]] = [[] for _ in configs]
    for rows in _batches(max(c.epochs for c in configs)):
        for member, value in zip(
            stack.members, stack.step(features[rows], targets_NC[rows]).tolist(), strict=True
        ):
            losses[member].append(value)
    stack.remember(range(len(stack)))
    return stack, losses


def _assert_equal(stack: HeadStack, losses: list[list[float]], configs: list[TrialConfig]) -> None:
    for place, member in enumerate(stack.members):
        alone_losses, alone_state = _train_alone(configs[member])
        assert losses[member] == pytest.approx(alone_losses, rel=1e-4, abs=1e-6)
        state = stack.best_state(place)
        assert state.keys() == alone_state.keys()
        for name, weight in state.items():
            torch.testing.assert_close(weight, alone_state[name], rtol=2e-3, atol=2e-5)


def test_every_registered_choice_is_covered() -> None:
    assert HEAD_SETTINGS.keys() == HEADS.keys()
    assert OPTIMIZER_SETTINGS.keys() == OPTIMIZERS.keys()
    assert LOSS_SETTINGS.keys() == LOSSES.keys()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "rules"])
def test_stacked_head_equals_head_alone(
    compiled: bool, head: str, optimizer: str, loss: str
) -> None:
    """Every optimizer x loss x head, with several settings of each in one stack; by a CPU's
    kernels, and by what stands for them on other devices."""
    settings = itertools.product(OPTIMIZER_SETTINGS[optimizer], LOSS_SETTINGS[loss])
    configs = [
        TrialConfig(
            backbone="ffn",
            optimizer=optimizer,
            loss=loss,
            epochs=EPOCHS,
            seed=seed,
            schedule=("constant", "cosine", "one_cycle")[seed % 3],
            warmup_fraction=0.25,
            **HEAD_SETTINGS[head],
            **chosen,
            **further,
        )
        for seed, (chosen, further) in enumerate(settings)
    ]
    stack, losses = _train_stack(configs, compiled=compiled)
    _assert_equal(stack, losses, configs)


@pytest.mark.parametrize("head", HEADS)
def test_mixed_stack_equals_heads_alone(head: str) -> None:
    """All losses and optimizers side by side in one stack, given in no order."""
    configs = [
        TrialConfig(
            backbone="ffn",
            optimizer=optimizer,
            loss=loss,
            epochs=EPOCHS,
            seed=place,
            **HEAD_SETTINGS[head],
            **OPTIMIZER_SETTINGS[optimizer][-1],
            **LOSS_SETTINGS[loss][-1],
        )
        for place, (loss, optimizer) in enumerate(itertools.product(LOSSES, OPTIMIZERS))
    ]
    configs = [configs[i] for i in np.random.default_rng(0).permutation(len(configs))]
    stack, losses = _train_stack(configs)
    assert stack.members != sorted(stack.members)
    _assert_equal(stack, losses, configs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_different_length_share_a_stack(schedule: str) -> None:
    """A head with fewer epochs follows its own schedule; the longer head is not affected."""
    long = TrialConfig(
        backbone="ffn", lr=0.05, epochs=EPOCHS, schedule=schedule, warmup_fraction=0.3
    )
    short = dataclasses.replace(long, epochs=2)
    _, losses = _train_stack([short, long])
    alone, _ = _train_alone(short)
    assert losses[0][: len(alone)] == pytest.approx(alone, rel=1e-4)
    assert losses[1] == pytest.approx(_train_alone(long)[0], rel=1e-4)


def _states(stack: HeadStack) -> dict[int, dict[str, Tensor]]:
    stack.remember(range(len(stack)))
    return {m: stack.best_state(place) for place, m in enumerate(stack.members)}


@pytest.mark.parametrize("head", HEADS)
def test_leaving_heads_do_not_touch_the_others(head: str) -> None:
    """Dropout included: each head's masks come from its own seed, whoever else is there."""
    dropout = 0.0 if head == "csra" else 0.3
    configs = [
        TrialConfig(
            backbone="ffn", seed=seed, lr=0.02, dropout=dropout, optimizer=optimizer,
            epochs=EPOCHS, **HEAD_SETTINGS[head],
        )
        for seed, optimizer in enumerate(["sgd", "adamw", "rmsprop", "adam", "adamw"])
    ]  # fmt: skip
    features, targets_NC = _data(HEADS[head].spatial)
    stays = [1, 4]
    ends = []
    for leave in (False, True):
        stack = HeadStack(
            configs, num_features=D, train_targets_NC=targets_NC, steps_per_epoch=N // BATCH
        )
        for step, rows in enumerate(_batches(EPOCHS)):
            if leave and step == 5:
                stack.keep([i for i, m in enumerate(stack.members) if m in stays])
            stack.step(features[rows], targets_NC[rows])
        ends.append(_states(stack))
    assert set(ends[1]) == set(stays)
    for member in stays:
        for name, weight in ends[1][member].items():
            torch.testing.assert_close(weight, ends[0][member][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_bfloat16_a_stacked_head_equals_a_head_alone_under_autocast(
    head: str, optimizer: str
) -> None:
    """Losses of the first steps; then roundings of either kind have grown into each other."""
    config = TrialConfig(
        backbone="ffn", epochs=1, optimizer=optimizer, **HEAD_SETTINGS[head],
        **{**OPTIMIZER_SETTINGS[optimizer][-1], "lr": 0.01},
    )  # fmt: skip
    features, targets_NC = _data(HEADS[head].spatial)
    stack = HeadStack(
        [config, dataclasses.replace(config, seed=1)], num_features=D,
        train_targets_NC=targets_NC, steps_per_epoch=-(-N // BATCH), precision=BFLOAT16,
    )  # fmt: skip
    losses = [stack.step(features[rows], targets_NC[rows])[0].item() for rows in _batches(1)]
    alone, _ = _train_alone(config, torch.autocast("cpu", torch.bfloat16))
    assert losses == pytest.approx(alone, rel=0.01)
    exact, _ = _train_alone(config)
    assert losses != pytest.approx(exact, rel=1e-6)


def test_dropout_is_drawn_from_the_heads_own_seed() -> None:
    configs = [
        TrialConfig(backbone="ffn", seed=seed, dropout=0.5, lr=0.1, epochs=EPOCHS)
        for seed in (1, 1, 2)
    ]
    _, losses = _train_stack(configs)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_diverging_head_leaves_the_others_alone() -> None:
    good = TrialConfig(backbone="ffn", optimizer="sgd", lr=0.1, epochs=EPOCHS)
    bad = dataclasses.replace(good, lr=1e30, weight_decay=1.0)
    _, losses = _train_stack([good, bad, good])
    assert not all(np.isfinite(losses[1]))
    alone, _ = _train_alone(good)
    assert losses[0] == pytest.approx(alone, rel=1e-4)
    assert losses[0] == losses[2]


def test_heads_of_different_structure_are_refused() -> None:
    configs = [
        TrialConfig(backbone="ffn"),
        TrialConfig(backbone="ffn", head="mlp", hidden_sizes=(4,)),
    ]
    with pytest.raises(ValueError, match="one structure"):
        HeadStack(configs, num_features=D, train_targets_NC=_data(False)[1], steps_per_epoch=1)
