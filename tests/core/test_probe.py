"""Training many heads at once: reports, stops, divergence, folds, and the weights that are kept.

N rows, D features, P places, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from core import probe
from core.config import TrialConfig
from core.heads import build_head
from core.inputs import feature_statistics
from core.metrics import topk_recall
from core.probe import METRICS, train_probes
from core.report import Metrics, Outcome, Status
from core.stack import HeadStack, head_settings
from core.views import BY_NAME, VIEWS

N, D, P, C = 150, 8, 4, 5
TRAIN, VALIDATION = np.arange(100, dtype=np.int64), np.arange(100, N, dtype=np.int64)
HOLD_OUT = [(TRAIN, VALIDATION)]
FEW = TrialConfig(backbone="ffn", epochs=4, batch_size=32, lr=0.05)
NAMES = {
    "train_loss",
    "train_top3_accuracy",
    "validation_loss",
    "validation_top3_accuracy",
    "lr",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give at these sizes, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _data(*, spatial: bool = False) -> tuple[np.ndarray, Tensor]:
    """Features from which the labels can be told, but not without fault."""
    rng = np.random.default_rng(0)
    targets = (rng.random((N, C)) < [0.5, 0.4, 0.3, 0.3, 0.2]).astype(np.float32)
    targets[:, 0] = np.maximum(targets[:, 0], targets.sum(1) == 0)
    pooled = targets @ rng.normal(0, 1, (C, D)) + rng.normal(0, 1.5, (N, D)) + 3
    if not spatial:
        return pooled.astype(np.float32), torch.from_numpy(targets)
    places = pooled[:, None] + rng.normal(0, 0.5, (N, P, D))
    return places.astype(np.float16), torch.from_numpy(targets)


def _train(configs: list[TrialConfig], **settings: Any) -> list[Outcome]:
    features, targets_NC = _data(spatial=configs[0].head == "csra")
    return train_probes(features, targets_NC, HOLD_OUT, configs, **settings)


def _variants(config: TrialConfig = FEW, count: int = 5) -> list[TrialConfig]:
    """Trials of several stacks and of several kinds."""
    changes: list[dict[str, Any]] = [
        {"lr": 0.2, "optimizer": "sgd"},
        {"head": "mlp", "hidden_sizes": (6,), "dropout": 0.2},
        {"loss": "cross_entropy", "class_weights": "inverse", "seed": 3},
        {"batch_size": 50, "loss": "asymmetric"},
        {"feature_norm": "none", "optimizer": "rmsprop", "epochs": 2},
    ]
    return [dataclasses.replace(config, **change) for change in changes[:count]]


def _further_views(features: np.ndarray) -> dict[str, np.ndarray]:
    """Every further view there is: the features with noise of its own."""
    names = [name for name in BY_NAME if name != "plain"]
    rngs = [np.random.default_rng(100 + place) for place, _ in enumerate(names)]
    return {
        name: (features + rng.normal(0, 1, features.shape)).astype(features.dtype)
        for name, rng in zip(names, rngs, strict=True)
    }


def _assert_same_curve(first: Sequence[Metrics], second: Sequence[Metrics]) -> None:
    """Equal up to the rounding of another stack's products."""
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def _assert_same(first: Outcome, second: Outcome, *, exactly: bool = True) -> None:
    """Equal but for the time: exactly, or up to the rounding of another stack's products."""
    assert (first.status, first.reason) == (second.status, second.reason)
    if exactly:
        assert first.curve == second.curve
    _assert_same_curve(first.curve, second.curve)
    for name in ("best_epoch", "best_value", "best_metrics"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert ours == (theirs if exactly else pytest.approx(theirs, rel=1e-4)), name
    if first.state is not None and second.state is not None:
        for key, weight in first.state.items():
            torch.testing.assert_close(weight, second.state[key], rtol=1e-3, atol=1e-5)


def test_every_epoch_of_every_running_trial_is_reported() -> None:
    heard: list[tuple[int, dict[int, Metrics]]] = []

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        heard.append((epoch, dict(metrics)))
        return ()

    configs = _variants()
    outcomes = _train(configs, report=report)
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
    for outcome in _train(_variants(dataclasses.replace(FEW, epochs=12))):
        values = [metrics["validation_top3_accuracy"] for metrics in outcome.curve]
        assert outcome.best_value == max(values)
        assert outcome.best_epoch == values.index(max(values)) + 1  # the earliest of equals
        assert outcome.curve[-1]["train_loss"] < outcome.curve[0]["train_loss"]
    untrained = _train([dataclasses.replace(FEW, lr=1e-9)])[0]
    trained = _train([FEW])[0]
    assert trained.best_value is not None
    assert untrained.best_value is not None
    assert trained.best_value > untrained.best_value + 0.1


def test_the_learning_rate_is_reported_as_scheduled() -> None:
    cosine = dataclasses.replace(FEW, schedule="cosine")
    rates = [metrics["lr"] for metrics in _train([cosine])[0].curve]
    steps = np.array([4, 8, 12, 16]) - 1  # 4 batches an epoch; the rate of the last
    expected = 0.05 * 0.5 * (1 + np.cos(np.pi * steps / 16))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_curve_is_that_of_a_plain_loop() -> None:
    """torch.optim on scaled features, with the batches that the order's seed gives."""
    (outcome,) = _train([FEW], order_seed=6)
    features, targets_NC = _data()
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
    outcomes = _train(configs, keep_state=True)
    assert any(o.best_epoch != configs[0].epochs for o in outcomes)
    features, targets_NC = _data(spatial=head == "csra")
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

    configs = _variants(count=4)
    alone = _train(configs)
    outcomes = _train(configs, report=report, keep_state=True)
    for place, epoch in ((0, 1), (2, 2), (3, 2)):
        outcome = outcomes[place]
        assert outcome.status is Status.PRUNED
        assert outcome.reason == f"pruned at epoch {epoch}"
        _assert_same_curve(outcome.curve, alone[place].curve[:epoch])
        assert outcome.best_epoch is not None
        assert outcome.best_epoch <= epoch
        assert outcome.state is None
    _assert_same(outcomes[1], alone[1], exactly=False)
    assert outcomes[1].status is Status.COMPLETE


def test_a_stop_in_the_last_epoch_is_complete() -> None:
    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        return metrics if epoch == FEW.epochs else ()

    outcomes = _train([FEW, dataclasses.replace(FEW, epochs=6)], report=report)
    assert [o.status for o in outcomes] == [Status.COMPLETE, Status.PRUNED]
    assert [len(o.curve) for o in outcomes] == [4, 4]
    assert outcomes[0].best_metrics


def test_stops_of_trials_that_are_gone_are_passed_over() -> None:
    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        return [0, 99]

    outcomes = _train([dataclasses.replace(FEW, epochs=3), FEW], report=report)
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
    outcomes = _train(configs, report=report, keep_state=True)
    assert outcomes[1].status is Status.FAILED
    epoch = len(outcomes[1].curve) + 1
    assert outcomes[1].reason.startswith(f"diverged in epoch {epoch}: ")
    assert "train_loss is nan" in outcomes[1].reason
    assert outcomes[1].state is None
    assert told[epoch - 1 :] == [{0, 2}] * (good.epochs - epoch + 1)
    without = _train([configs[0], configs[2]], keep_state=True)
    for place, expected in ((0, without[0]), (2, without[1])):
        assert outcomes[place].status is Status.COMPLETE
        _assert_same(outcomes[place], expected, exactly=False)


def test_if_all_diverge_all_fail() -> None:
    bad = dataclasses.replace(FEW, lr=1e30, weight_decay=1.0, optimizer="sgd")
    outcomes = _train([bad, dataclasses.replace(bad, head="mlp", hidden_sizes=(4,))])
    assert [o.status for o in outcomes] == [Status.FAILED] * 2
    assert all(o.best_metrics == {} for o in outcomes)


def test_metrics_are_means_over_the_folds() -> None:
    features, targets_NC = _data()
    rows = np.random.default_rng(5).permutation(N)
    parts = [np.sort(part) for part in np.split(rows, [60, 100])]  # of unequal sizes
    folds = [(np.setdiff1d(rows, part), part) for part in parts]
    configs = _variants()
    together = train_probes(features, targets_NC, folds, configs)
    apart = [train_probes(features, targets_NC, [fold], configs) for fold in folds]
    for place, outcome in enumerate(together):
        singles = [outcomes[place] for outcomes in apart]
        for epoch, metrics in enumerate(outcome.curve):
            means = {n: np.mean([s.curve[epoch][n] for s in singles]) for n in NAMES}
            assert metrics == pytest.approx(means)
        values = [m["validation_top3_accuracy"] for m in outcome.curve]
        assert outcome.best_value == max(values)


def test_the_state_kept_is_the_first_folds() -> None:
    features, targets_NC = _data()
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


def test_a_seeded_run_twice_is_identical() -> None:
    configs = _variants()
    torch.manual_seed(1)
    first = _train(configs, keep_state=True)
    torch.manual_seed(2)
    np.random.seed(7)
    for one, other in zip(first, _train(configs, keep_state=True), strict=True):
        _assert_same(one, other)
    changed = _train(configs, order_seed=1)
    assert all(a.curve != b.curve for a, b in zip(first, changed, strict=True))
    reseeded = [dataclasses.replace(c, seed=c.seed + 1) for c in configs]
    assert all(a.curve != b.curve for a, b in zip(first, _train(reseeded), strict=True))


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
    (alone,) = _train([config], keep_state=True)
    _assert_same(_train([*others, config], keep_state=True)[-1], alone, exactly=False)
    _assert_same(_train([config, *others[::-1]], keep_state=True)[0], alone, exactly=False)


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
    features, targets_NC = _data(spatial=head == "csra")
    further = _further_views(features)
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
    features, targets_NC = _data()
    further = _further_views(features)
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
        _assert_same(outcome, alone, exactly=False)
    _assert_same(together[1], _train([configs[1]])[0], exactly=False)
    assert len({outcome.curve[0]["train_loss"] for outcome in together}) == len(configs)


def test_views_with_folds_and_a_view_that_is_not_there() -> None:
    features, targets_NC = _data()
    further = _further_views(features)
    config = dataclasses.replace(FEW, views="flip")
    folds = [HOLD_OUT[0], (VALIDATION, TRAIN)]
    (both,) = train_probes(features, targets_NC, folds, [config], further_views=further)
    apart = [
        train_probes(features, targets_NC, [fold], [config], further_views=further)[0]
        for fold in folds
    ]
    for epoch, metrics in enumerate(both.curve):
        means = {n: np.mean([single.curve[epoch][n] for single in apart]) for n in NAMES}
        assert metrics == pytest.approx(means)
    with pytest.raises(ValueError, match="mirrored"):
        train_probes(features, targets_NC, HOLD_OUT, [config])


def test_a_small_memory_makes_more_stacks_and_the_same_outcomes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs = [dataclasses.replace(FEW, seed=seed) for seed in range(5)]
    whole = _train(configs)
    sizes: list[int] = []
    stack = probe.HeadStack

    def counting(members: list[TrialConfig], **settings: Any) -> probe.HeadStack:
        sizes.append(len(members))
        return stack(members, **settings)

    monkeypatch.setattr(probe, "HeadStack", counting)
    size = probe.bytes_of_head(
        FEW, num_features=D, num_places=1, num_classes=C, num_evaluated=len(VALIDATION)
    )
    monkeypatch.setattr(probe, "STACK_BYTES", 2 * size)
    for one, other in zip(whole, _train(configs), strict=True):
        _assert_same(one, other, exactly=False)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(probe, "STACK_BYTES", 1)
    _train(configs[:2])
    assert sizes[3:] == [1, 1]


@pytest.mark.parametrize("head", ["linear", "mlp", "csra"])
def test_the_memory_of_a_head_covers_what_a_step_keeps(head: str) -> None:
    """What autograd saves of the batch is most of it, and grows with batch and places."""
    sizes = {"hidden_sizes": (40, 30)} if head == "mlp" else {}
    config = dataclasses.replace(FEW, head=head, batch_size=64, loss="asymmetric", **sizes)
    num_places = 50 if head == "csra" else 1
    stack = HeadStack([config], num_features=D, train_targets_NC=_data()[1], steps_per_epoch=9)
    shape = (64, num_places, D) if head == "csra" else (64, D)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack.step(torch.randn(shape), _data()[1][:64])
    size = probe.bytes_of_head(
        config, num_features=D, num_places=num_places, num_classes=C, num_evaluated=0
    )
    assert size / 6 < sum(saved.values()) < size


@pytest.mark.parametrize("objective", METRICS)
def test_the_objective_chooses_the_best_epoch(objective: str) -> None:
    config = dataclasses.replace(FEW, epochs=12, lr=0.5, optimizer="adam")
    (outcome,) = _train([config], objective=objective, keep_state=True)
    assert set(outcome.curve[0]) == NAMES | {f"validation_{objective}"}
    values = [metrics[f"validation_{objective}"] for metrics in outcome.curve]
    assert outcome.best_value == max(values)
    assert outcome.best_epoch == values.index(max(values)) + 1


def test_mean_average_precision_is_sklearns_at_the_best_epoch() -> None:
    (outcome,) = _train(
        [dataclasses.replace(FEW, epochs=8)], objective="mean_average_precision", keep_state=True
    )
    features, targets_NC = _data()
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

        monkeypatch.setitem(probe.METRICS, name, counting)
    _train([dataclasses.replace(FEW, epochs=1)], objective=objective)
    assert sorted(calls) == sorted(["top3_accuracy", *{"top3_accuracy", objective}])


def test_csra_reads_maps_from_disk(tmp_path) -> None:
    """A read-only half-precision map gives what the same map in memory gives."""
    features, targets_NC = _data(spatial=True)
    np.save(tmp_path / "map.npy", features)
    mapped = np.load(tmp_path / "map.npy", mmap_mode="r")
    configs = [
        dataclasses.replace(FEW, head="csra", csra_lambda=lam, csra_temperature=t, seed=1)
        for lam, t in ((0.0, 1.0), (0.5, 2.0), (1.0, 99.0))
    ]
    outcomes = train_probes(mapped, targets_NC, HOLD_OUT, configs, keep_state=True)
    for one, other in zip(outcomes, _train(configs, keep_state=True), strict=True):
        _assert_same(one, other)
    assert len({o.curve[0]["train_loss"] for o in outcomes}) == 3
    # Without attention it is the linear head on the mean of the same scaled places.
    mean_D, deviation_D = feature_statistics(features, TRAIN)
    scaled = (torch.from_numpy(features).float() - mean_D) / deviation_D
    linear = dataclasses.replace(FEW, feature_norm="none", seed=1)
    (expected,) = train_probes(scaled.mean(1).numpy(), targets_NC, HOLD_OUT, [linear])
    _assert_same_curve(outcomes[0].curve, expected.curve)


def test_no_trials_no_outcomes() -> None:
    features, targets_NC = _data()
    assert train_probes(features, targets_NC, HOLD_OUT, []) == []
