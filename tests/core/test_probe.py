"""Training heads on features: reports, stops, divergence, folds, and the weights that are kept.

N rows, D features, P places, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from core.encoding.inputs import feature_statistics
from core.head_settings import head_settings
from core.heads import build_head
from core.metrics import topk_recall
from core.objectives import METRICS
from core.probing.probe import train_probes
from core.report import Metrics, Status

from .small_probes import (
    FEW,
    HOLD_OUT,
    NAMES,
    TRAIN,
    VALIDATION,
    C,
    D,
    N,
    assert_same,
    assert_same_curve,
    make_data,
    train_all,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_epoch_of_every_running_trial_is_reported() -> None:
    heard: list[tuple[int, dict[int, Metrics]]] = []

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        heard.append((epoch, dict(metrics)))
        return ()

    configs = variants()
    outcomes = train_all(configs, report=report)
    assert [epoch for epoch, _ in heard] == [1, 2, 3, 4]
    assert [set(metrics) for _, metrics in heard] == [{0, 1, 2, 3, 4}] * 2 + [{0, 1, 2, 3}] * 2
    for place, (config, outcome) in enumerate(zip(configs, outcomes, strict=True)):
        assert outcome.status is Status.COMPLETE
        assert outcome.reason == ""
        assert len(outcome.curve) == config.epochs
        assert all(set(metrics) == NAMES for metrics in outcome.curve)
        reported = [metrics[place] for _, metrics in heard if place in metrics]
        assert list(outcome.curve) == reported
        assert outcome.seconds > 0
        assert outcome.state is None  # nobody asked


def test_heads_learn_and_the_best_epoch_is_the_trials_value() -> None:
    for outcome in train_all(variants(dataclasses.replace(FEW, epochs=12))):
        values = [metrics["validation_top3_accuracy"] for metrics in outcome.curve]
        assert outcome.best_value == max(values)
        assert outcome.best_epoch == values.index(max(values)) + 1  # the earliest of equals
        assert outcome.curve[-1]["train_loss"] < outcome.curve[0]["train_loss"]
    untrained = train_all([dataclasses.replace(FEW, lr=1e-9)])[0]
    trained = train_all([FEW])[0]
    assert trained.best_value is not None
    assert untrained.best_value is not None
    assert trained.best_value > untrained.best_value + 0.1


def test_the_learning_rate_is_reported_as_scheduled() -> None:
    cosine = dataclasses.replace(FEW, schedule="cosine")
    rates = [metrics["lr"] for metrics in train_all([cosine])[0].curve]
    steps = np.array([4, 8, 12, 16]) - 1  # 4 batches an epoch; the rate of the last
    expected = 0.05 * 0.5 * (1 + np.cos(np.pi * steps / 16))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_curve_is_that_of_a_plain_loop() -> None:
    """torch.optim on scaled features, with the batches that the order's seed gives."""
    (outcome,) = train_all([FEW], order_seed=6)
    features, targets_NC = make_data()
    mean_D, deviation_D = feature_statistics(features, TRAIN)
    x_ND = (torch.from_numpy(features) - mean_D) / deviation_D
    head = build_head(num_features=D, num_classes=C, **head_settings(FEW))
    optimizer = torch.optim.AdamW(head.parameters(), lr=FEW.lr, weight_decay=0.0)
    loss_of = torch.nn.BCEWithLogitsLoss()
    for epoch, metrics in enumerate(outcome.curve, 1):
        total = 0.0
        for rows in np.split(np.random.default_rng([6, epoch]).permutation(TRAIN), [32, 64, 96]):
            loss = loss_of(head(x_ND[rows]), targets_NC[rows])
            total += loss.item() * len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits_NC = head(x_ND)
        seen = TRAIN[::2][: len(VALIDATION)]  # as many as validation rows, spread evenly
        expected = {
            "train_loss": total / len(TRAIN),
            "train_top3_accuracy": topk_recall(logits_NC[seen], targets_NC[seen]),
            "validation_loss": loss_of(logits_NC[VALIDATION], targets_NC[VALIDATION]),
            "validation_top3_accuracy": topk_recall(logits_NC[VALIDATION], targets_NC[VALIDATION]),
            "lr": FEW.lr,
        }
        expected = {name: float(value) for name, value in expected.items()}
        assert metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("head", ["linear", "mlp", "csra"])
@pytest.mark.parametrize("feature_norm", ["standardize", "none"])
def test_the_state_kept_is_the_best_epochs(head: str, feature_norm: str) -> None:
    """The head's module with these weights gives the trial's value again."""
    sizes = {"hidden_sizes": (12,)} if head == "mlp" else {}
    wild = {"lr": 0.5, "optimizer": "adam", "epochs": 12, "feature_norm": feature_norm}
    configs = [dataclasses.replace(FEW, head=head, seed=seed, **sizes, **wild) for seed in range(4)]
    outcomes = train_all(configs, keep_state=True)
    assert any(o.best_epoch != configs[0].epochs for o in outcomes)
    features, targets_NC = make_data(spatial=head == "csra")
    x = torch.from_numpy(features).float()
    if feature_norm == "standardize":
        mean_D, deviation_D = feature_statistics(features, TRAIN)
        x = (x - mean_D) / deviation_D
    if head == "csra":
        x = x.transpose(1, 2).unflatten(2, (2, 2))
    validation_NC = targets_NC[VALIDATION]
    for config, outcome in zip(configs, outcomes, strict=True):
        module = build_head(num_features=D, num_classes=C, **head_settings(config)).eval()
        assert outcome.state is not None
        module.load_state_dict(outcome.state)
        with torch.no_grad():
            logits_NC = module(x[VALIDATION])
        assert float(topk_recall(logits_NC, validation_NC)) == outcome.best_value
        expected = average_precision_score(validation_NC, logits_NC, average="macro")
        found = outcome.best_metrics["validation_mean_average_precision"]
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_stop_ends_a_trial_as_pruned_with_its_step() -> None:
    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        return {1: [0], 2: [3, 2]}.get(epoch, [])

    configs = variants(count=4)
    alone = train_all(configs)
    outcomes = train_all(configs, report=report, keep_state=True)
    for place, epoch in ((0, 1), (2, 2), (3, 2)):
        outcome = outcomes[place]
        assert outcome.status is Status.PRUNED
        assert outcome.reason == f"pruned at epoch {epoch}"
        assert_same_curve(outcome.curve, alone[place].curve[:epoch])
        assert outcome.best_epoch is not None
        assert outcome.best_epoch <= epoch
        assert outcome.state is None
    assert_same(outcomes[1], alone[1], exactly=False)
    assert outcomes[1].status is Status.COMPLETE


def test_a_stop_in_the_last_epoch_is_complete() -> None:
    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        return metrics if epoch == FEW.epochs else ()

    outcomes = train_all([FEW, dataclasses.replace(FEW, epochs=6)], report=report)
    assert [o.status for o in outcomes] == [Status.COMPLETE, Status.PRUNED]
    assert [len(o.curve) for o in outcomes] == [4, 4]
    assert outcomes[0].best_metrics


def test_stops_of_trials_that_are_gone_are_passed_over() -> None:
    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        return [0, 99]

    outcomes = train_all([dataclasses.replace(FEW, epochs=3), FEW], report=report)
    assert [o.status for o in outcomes] == [Status.PRUNED, Status.COMPLETE]


@pytest.mark.parametrize("head", ["linear", "csra"])
def test_a_diverged_trial_fails_alone(head: str) -> None:
    good = dataclasses.replace(FEW, head=head)
    bad = dataclasses.replace(good, lr=1e30, weight_decay=1.0, optimizer="sgd")
    told: list[set[int]] = []

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        told.append(set(metrics))
        assert all(np.isfinite(list(m.values())).all() for m in metrics.values())
        return ()

    configs = [good, bad, dataclasses.replace(good, optimizer="sgd", seed=1)]
    outcomes = train_all(configs, report=report, keep_state=True)
    assert outcomes[1].status is Status.FAILED
    epoch = len(outcomes[1].curve) + 1
    assert outcomes[1].reason.startswith(f"diverged in epoch {epoch}: ")
    assert "train_loss is nan" in outcomes[1].reason
    assert outcomes[1].state is None
    assert told[epoch - 1 :] == [{0, 2}] * (good.epochs - epoch + 1)
    without = train_all([configs[0], configs[2]], keep_state=True)
    for place, expected in ((0, without[0]), (2, without[1])):
        assert outcomes[place].status is Status.COMPLETE
        assert_same(outcomes[place], expected, exactly=False)


def test_if_all_diverge_all_fail() -> None:
    bad = dataclasses.replace(FEW, lr=1e30, weight_decay=1.0, optimizer="sgd")
    outcomes = train_all([bad, dataclasses.replace(bad, head="mlp", hidden_sizes=(4,))])
    assert [o.status for o in outcomes] == [Status.FAILED] * 2
    assert all(o.best_metrics == {} for o in outcomes)


def test_metrics_are_means_over_the_folds() -> None:
    features, targets_NC = make_data()
    rows = np.random.default_rng(5).permutation(N)
    parts = [np.sort(part) for part in np.split(rows, [60, 100])]  # of unequal sizes
    folds = [(np.setdiff1d(rows, part), part) for part in parts]
    configs = variants()
    together = train_probes(features, targets_NC, folds, configs)
    apart = [train_probes(features, targets_NC, [fold], configs) for fold in folds]
    for place, outcome in enumerate(together):
        singles = [outcomes[place] for outcomes in apart]
        for epoch, metrics in enumerate(outcome.curve):
            means = {n: np.mean([s.curve[epoch][n] for s in singles]) for n in NAMES}
            by_fold = {
                f"validation_top3_accuracy_fold_{k}": s.curve[epoch]["validation_top3_accuracy"]
                for k, s in enumerate(singles, 1)
            }
            assert metrics == pytest.approx(means | by_fold)
        values = [m["validation_top3_accuracy"] for m in outcome.curve]
        assert outcome.best_value == max(values)


def test_the_state_kept_is_the_first_folds() -> None:
    features, targets_NC = make_data()
    config = dataclasses.replace(FEW, epochs=1)
    folds = [(TRAIN, VALIDATION), (VALIDATION, TRAIN)]
    states = [
        train_probes(features, targets_NC, chosen, [config], keep_state=True)[0].state
        for chosen in (folds, folds[:1], folds[1:])
    ]
    together, first, second = states
    assert together is not None
    assert first is not None
    assert second is not None
    for name, weight in together.items():
        torch.testing.assert_close(weight, first[name])
        assert not torch.allclose(weight, second[name])


@pytest.mark.parametrize("objective", METRICS)
def test_the_objective_chooses_the_best_epoch(objective: str) -> None:
    config = dataclasses.replace(FEW, epochs=12, lr=0.5, optimizer="adam")
    (outcome,) = train_all([config], objective=objective, keep_state=True)
    assert set(outcome.curve[0]) == NAMES | {f"validation_{objective}"}
    values = [metrics[f"validation_{objective}"] for metrics in outcome.curve]
    assert outcome.best_value == max(values)
    assert outcome.best_epoch == values.index(max(values)) + 1


def test_mean_average_precision_is_sklearns_at_the_best_epoch() -> None:
    (outcome,) = train_all(
        [dataclasses.replace(FEW, epochs=8)], objective="mean_average_precision", keep_state=True
    )
    features, targets_NC = make_data()
    mean_D, deviation_D = feature_statistics(features, TRAIN)
    assert outcome.state is not None
    weight, bias = outcome.state["layers.0.weight"], outcome.state["layers.0.bias"]
    logits_NC = ((torch.from_numpy(features) - mean_D) / deviation_D)[VALIDATION] @ weight.T + bias
    expected = average_precision_score(targets_NC[VALIDATION], logits_NC, average="macro")
    assert outcome.best_value == pytest.approx(expected, abs=1e-6)
    assert outcome.best_metrics["validation_mean_average_precision"] == outcome.best_value


@pytest.mark.parametrize("objective", METRICS)
def test_each_validation_metric_is_computed_once_an_epoch(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, metric in METRICS.items():

        def counting(*args: Any, name: str = name, metric: Any = metric, **kw: Any) -> Tensor:
            calls.append(name)
            return metric(*args, **kw)

        monkeypatch.setitem(METRICS, name, counting)
    train_all([dataclasses.replace(FEW, epochs=1)], objective=objective)
    assert sorted(calls) == sorted(["top3_accuracy", *{"top3_accuracy", objective}])


def test_csra_reads_maps_from_disk(tmp_path) -> None:
    """A read-only half-precision map gives what the same map in memory gives."""
    features, targets_NC = make_data(spatial=True)
    np.save(tmp_path / "map.npy", features)
    mapped = np.load(tmp_path / "map.npy", mmap_mode="r")
    configs = [
        dataclasses.replace(FEW, head="csra", csra_lambda=lam, csra_temperature=t, seed=1)
        for lam, t in ((0.0, 1.0), (0.5, 2.0), (1.0, 99.0))
    ]
    outcomes = train_probes(mapped, targets_NC, HOLD_OUT, configs, keep_state=True)
    for one, other in zip(outcomes, train_all(configs, keep_state=True), strict=True):
        assert_same(one, other)
    assert len({o.curve[0]["train_loss"] for o in outcomes}) == 3
    # Without attention it is the linear head on the mean of the same scaled places.
    mean_D, deviation_D = feature_statistics(features, TRAIN)
    scaled = (torch.from_numpy(features).float() - mean_D) / deviation_D
    linear = dataclasses.replace(FEW, feature_norm="none", seed=1)
    (expected,) = train_probes(scaled.mean(1).numpy(), targets_NC, HOLD_OUT, [linear])
    assert_same_curve(outcomes[0].curve, expected.curve)


def test_no_trials_no_outcomes() -> None:
    features, targets_NC = make_data()
    assert train_probes(features, targets_NC, HOLD_OUT, []) == []
