"""Heads trained in company, on views, in any number of stacks: each as if it were alone.

N rows, D features, P places, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from core.config import TrialConfig
from core.encoding.inputs import feature_statistics
from core.head_settings import head_settings
from core.heads import build_head
from core.images.views import VIEWS
from core.probing import group, probe
from core.probing.probe import train_probes
from core.probing.stack import HeadStack, bytes_of_head

from .small_probes import (
    FEW,
    HOLD_OUT,
    NAMES,
    TRAIN,
    VALIDATION,
    C,
    D,
    assert_same,
    make_data,
    train_all,
    variants,
    views_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_seeded_run_twice_is_identical() -> None:
    configs = variants()
    torch.manual_seed(1)
    first = train_all(configs, keep_state=True)
    torch.manual_seed(2)
    np.random.seed(7)
    for one, other in zip(first, train_all(configs, keep_state=True), strict=True):
        assert_same(one, other)
    changed = train_all(configs, order_seed=1)
    assert all(a.curve != b.curve for a, b in zip(first, changed, strict=True))
    reseeded = [dataclasses.replace(c, seed=c.seed + 1) for c in configs]
    assert all(a.curve != b.curve for a, b in zip(first, train_all(reseeded), strict=True))


@pytest.mark.parametrize("head", ["linear", "mlp", "csra"])
def test_company_does_not_change_a_trial(head: str) -> None:
    """A trial alone, among others, and in another order has one curve."""
    settings: dict[str, Any] = {"head": head, "hidden_sizes": (7,) if head == "mlp" else ()}
    if head != "csra":
        settings["dropout"] = 0.3
    config = dataclasses.replace(FEW, seed=11, **settings)
    others = [
        dataclasses.replace(config, seed=4, batch_size=50),
        dataclasses.replace(config, seed=1, optimizer="sgd", loss="focal", epochs=2),
        dataclasses.replace(config, seed=2, loss="cross_entropy", label_smoothing=0.1),
        dataclasses.replace(config, seed=3, class_weights="inverse", lr=0.5),
    ]
    (alone,) = train_all([config], keep_state=True)
    assert_same(train_all([*others, config], keep_state=True)[-1], alone, exactly=False)
    assert_same(train_all([config, *others[::-1]], keep_state=True)[0], alone, exactly=False)


@pytest.mark.parametrize("views", ["flip", "flip_crop"])
@pytest.mark.parametrize("head", ["linear", "mlp", "csra"])
def test_a_stack_with_views_equals_heads_alone_on_the_same_batches(head: str, views: str) -> None:
    """torch.optim on batches in which each picture has the view that the order's seed draws;
    statistics and evaluation are of the plain view."""
    sizes = {"hidden_sizes": (6,)} if head == "mlp" else {}
    configs = [
        dataclasses.replace(FEW, head=head, views=views, seed=seed, lr=0.02 * (1 + seed), **sizes)
        for seed in range(3)
    ]
    features, targets_NC = make_data(spatial=head == "csra")
    further = views_of(features)
    outcomes = train_probes(
        features, targets_NC, HOLD_OUT, configs, further_views=further, order_seed=6
    )
    mean_D, deviation_D = feature_statistics(features, TRAIN)
    seen = [features, *(further[view.name] for view in VIEWS[views][1:])]
    x_VND = (torch.from_numpy(np.stack(seen)).float() - mean_D) / deviation_D
    if head == "csra":
        x_VND = x_VND.transpose(2, 3).unflatten(3, (2, 2))
    loss_of = torch.nn.BCEWithLogitsLoss()
    for config, outcome in zip(configs, outcomes, strict=True):
        module = build_head(num_features=D, num_classes=C, **head_settings(config))
        optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, weight_decay=0.0)
        drawn = []
        for epoch, metrics in enumerate(outcome.curve, 1):
            chance = np.random.default_rng([6, epoch])
            order = chance.permutation(TRAIN)
            chosen = chance.integers(len(seen), size=len(order))
            drawn.append(chosen[np.argsort(order)])
            total = 0.0
            for start in range(0, len(order), 32):
                rows, places = order[start : start + 32], chosen[start : start + 32]
                loss = loss_of(module(x_VND[places, rows]), targets_NC[rows])
                total += loss.item() * len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                logits_NC = module(x_VND[0, VALIDATION])
            assert metrics["train_loss"] == pytest.approx(total / len(TRAIN), rel=1e-4)
            expected = float(loss_of(logits_NC, targets_NC[VALIDATION]))
            assert metrics["validation_loss"] == pytest.approx(expected, rel=1e-4)
        assert set(np.concatenate(drawn)) == set(range(len(seen)))
        assert not np.array_equal(drawn[0], drawn[1])  # another view in another epoch


def test_trials_of_several_views_in_one_call_are_each_as_alone() -> None:
    """Whoever else is there, and whichever further matrices lie ready."""
    features, targets_NC = make_data()
    further = views_of(features)
    configs = [
        dataclasses.replace(FEW, views=views, seed=seed)
        for seed in (0, 1)
        for views in ("flip_crop", "plain", "flip")
    ]
    together = train_probes(features, targets_NC, HOLD_OUT, configs, further_views=further)
    for config, outcome in zip(configs, together, strict=True):
        needed = {view.name: further[view.name] for view in VIEWS[config.views][1:]}
        (alone,) = train_probes(
            features, targets_NC, HOLD_OUT, [config], further_views=dict(reversed(needed.items()))
        )
        assert_same(outcome, alone, exactly=False)
    assert_same(together[1], train_all([configs[1]])[0], exactly=False)
    assert len({outcome.curve[0]["train_loss"] for outcome in together}) == len(configs)


def test_views_with_folds_and_a_view_that_is_not_there() -> None:
    features, targets_NC = make_data()
    further = views_of(features)
    config = dataclasses.replace(FEW, views="flip")
    folds = [HOLD_OUT[0], (VALIDATION, TRAIN)]
    (both,) = train_probes(features, targets_NC, folds, [config], further_views=further)
    apart = [
        train_probes(features, targets_NC, [fold], [config], further_views=further)[0]
        for fold in folds
    ]
    for epoch, metrics in enumerate(both.curve):
        means = {n: np.mean([single.curve[epoch][n] for single in apart]) for n in NAMES}
        objective = "validation_top3_accuracy"
        by_fold = {
            f"{objective}_fold_{k}": single.curve[epoch][objective]
            for k, single in enumerate(apart, 1)
        }
        assert metrics == pytest.approx(means | by_fold)
    with pytest.raises(ValueError, match="mirrored"):
        train_probes(features, targets_NC, HOLD_OUT, [config])


def test_a_small_memory_makes_more_stacks_and_the_same_outcomes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs = [dataclasses.replace(FEW, seed=seed) for seed in range(5)]
    whole = train_all(configs)
    sizes: list[int] = []
    stack = group.HeadStack

    def counting(members: list[TrialConfig], **settings: Any) -> group.HeadStack:
        sizes.append(len(members))
        return stack(members, **settings)

    monkeypatch.setattr(group, "HeadStack", counting)
    size = bytes_of_head(
        FEW, num_features=D, num_places=1, num_classes=C, num_evaluated=len(VALIDATION)
    )
    monkeypatch.setattr(probe, "STACK_BYTES", 2 * size)
    for one, other in zip(whole, train_all(configs), strict=True):
        assert_same(one, other, exactly=False)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(probe, "STACK_BYTES", 1)
    train_all(configs[:2])
    assert sizes[3:] == [1, 1]


@pytest.mark.parametrize("head", ["linear", "mlp", "csra"])
def test_the_memory_of_a_head_covers_what_a_step_allocates(head: str) -> None:
    """In the costliest loss and optimizer, where no kernel saves memory; it grows with batch and
    places."""
    sizes = {"hidden_sizes": (40, 30)} if head == "mlp" else {}
    config = dataclasses.replace(
        FEW, head=head, batch_size=64, loss="asymmetric", label_smoothing=0.1,
        class_weights="inverse", optimizer="rmsprop", **sizes,
    )  # fmt: skip
    num_places = 50 if head == "csra" else 1
    stack = HeadStack(
        [config],
        num_features=D,
        train_targets_NC=make_data()[1],
        steps_per_epoch=9,
        compiled=False,
    )
    features = torch.randn((64, num_places, D) if head == "csra" else (64, D))
    stack.step(features, make_data()[1][:64])
    with torch.profiler.profile(profile_memory=True) as profile:
        stack.step(features, make_data()[1][:64])
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    size = bytes_of_head(
        config, num_features=D, num_places=num_places, num_classes=C, num_evaluated=0
    )
    assert size / 6 < peak < size
