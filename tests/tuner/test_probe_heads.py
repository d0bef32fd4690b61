"""Heads of the best probes, kept for fine-tuning: which are kept, and that they are those probes'.

N pictures, D features, C classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import TrialConfig
from core.data.split import Split
from core.data.table import Table
from core.head_settings import head_settings
from core.heads import build_head
from core.metrics import topk_recall
from core.probing.probe import train_probes
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.study import TrialRecord
from tuner.trials.cluster import Workers
from tuner.trials.context import Context, FeatureRequest, request_of
from tuner.trials.head_start import head_path, head_state_for
from tuner.trials.probe_heads import Probe, keep_heads, train_heads
from tuner.trials.searcher import trial_seed

from ..contexts import small_context

N, D, C = 120, 12, 5
WORKERS = Workers(count=1, cpus=1.0, gpus=0.0)
BACKBONE = "squeezenet1_1"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A study on a table whose pictures nobody opens."""
    folder = tmp_path_factory.mktemp("study")
    rows = np.arange(N)
    targets_NC = (np.random.default_rng(0).random((N, C)) < 0.3).astype(np.uint8)
    table = Table(
        name="t", root=folder, ids=tuple(map(str, rows)), paths=(folder / "x.png",) * N,
        targets_NC=targets_NC, class_names=tuple("abcde"),
    )  # fmt: skip
    split = Split(seed=0, train=rows[:70], validation=rows[70:95], test=rows[95:])
    return small_context(table, folder, split=split, seed=5, folder=folder)


@pytest.fixture(scope="module")
def features(context: Context) -> dict[FeatureRequest, str]:
    """Features that know something of the labels, far from mean 0 and deviation 1."""
    chance = np.random.default_rng(1)
    matrix_ND = context.table.targets_NC @ chance.normal(size=(C, D)) * 3 + 7
    matrix_ND += chance.normal(size=(N, D))
    folder = context.folder / "features"
    folder.mkdir()
    np.save(folder / "matrix.npy", matrix_ND.astype(np.float32))
    return {request_of(TrialConfig(backbone=BACKBONE)): str(folder)}


def probe(number: int, value: float, status: str = "complete", **settings: Any) -> TrialRecord:
    return TrialRecord(
        number=number, status=status, reason="", value=value, best_epoch=1, epochs=4, seconds=1.0,
        settings={
            "mode": "probe", "backbone": BACKBONE, "lr": 0.02, "epochs": 4, "batch_size": 16,
            **settings,
        },
    )  # fmt: skip


def finetune_space(**parameters: Any) -> SearchSpace:
    values = {"backbone": BACKBONE, "head_start": "probe", **parameters}
    return parse_space({"mode": "finetune", "parameters": values}, name="f", after_probes=True)


def config_of(context: Context, record: TrialRecord) -> TrialConfig:
    seed = trial_seed(context.seed, record.number)
    return TrialConfig.from_dict({"seed": seed, **record.settings})


class _InlineRay:
    """Ray's remote functions in this process; counts the calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def remote(self, **resources: float) -> Callable[..., Any]:
        assert resources == {"num_cpus": WORKERS.cpus, "num_gpus": WORKERS.gpus}

        def wrap(function: Callable[..., Any]) -> Any:
            def call(context: Context, probes: Any, folder: Path) -> Any:
                self.calls.append([p.number for p in probes])
                return function(context, probes, folder)

            return type("Remote", (), {"remote": staticmethod(call)})

        return wrap


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> _InlineRay:
    import ray

    fake = _InlineRay()
    monkeypatch.setattr(ray, "remote", fake.remote)
    monkeypatch.setattr(ray, "get", lambda value: value)
    return fake


@pytest.mark.parametrize("norm", ["standardize", "none"])
def test_a_kept_head_scores_what_its_probe_scored(
    context: Context, features: dict[FeatureRequest, str], inline: _InlineRay, tmp_path: Path,
    norm: str,
) -> None:  # fmt: skip
    record = probe(3, 0.5, feature_norm=norm, weight_decay=0.1)
    assert keep_heads(tmp_path, finetune_space(), [record], features, context, WORKERS) == []
    mine = dataclasses.replace(context, folder=tmp_path)
    wanted = TrialConfig(backbone=BACKBONE, mode="finetune", head_start="probe")
    state = head_state_for(mine, wanted)
    assert state is not None
    mean_D, deviation_D = state.pop("mean_D"), state.pop("deviation_D")

    config = config_of(context, record)
    matrix_ND = np.load(Path(features[request_of(config)]) / "matrix.npy")
    targets_NC = torch.from_numpy(context.table.targets_NC).float()
    (outcome,) = train_probes(
        matrix_ND, targets_NC, context.split.pairs(), [config], order_seed=context.seed,
    )  # fmt: skip
    if norm == "standardize":
        train = matrix_ND[context.split.train].astype(np.float64)
        np.testing.assert_allclose(mean_D, train.mean(0), rtol=1e-5)
        np.testing.assert_allclose(deviation_D, train.std(0), rtol=1e-5)
    else:
        assert (mean_D == 0).all() and (deviation_D == 1).all()
    head = build_head(num_features=D, num_classes=C, **head_settings(wanted))
    head.load_state_dict(state)
    rows = context.split.validation
    logits_NC = head((torch.from_numpy(matrix_ND[rows]) - mean_D) / deviation_D)
    value = float(topk_recall(logits_NC, targets_NC[rows], 3))
    assert value == pytest.approx(outcome.best_value, abs=1e-6)
    assert value > 0.6, "chance is 3 of 5"


def test_the_best_complete_probe_of_each_structure_is_kept(
    context: Context, features: dict[FeatureRequest, str], inline: _InlineRay, tmp_path: Path
) -> None:
    mlp = {"head": "mlp", "hidden_sizes": [8]}
    space = finetune_space(
        backbone=[BACKBONE, "mobilenet_v2"],
        head=["linear", "mlp"],
        hidden_sizes={"when": {"head": "mlp"}, "choice": [[8], [16]]},
        head_start=["random", "probe"],
    )
    trials = [
        probe(0, 0.4),
        probe(1, 0.6),
        probe(2, 0.9, "pruned"),
        probe(3, 0.3, **mlp),
        probe(4, 0.8, head="mlp", hidden_sizes=[4]),  # of no use there
    ]
    without = keep_heads(tmp_path, space, trials, features, context, WORKERS)
    assert without == [
        "mobilenet_v2 linear avg 1",
        "mobilenet_v2 mlp [16] avg 1",
        "mobilenet_v2 mlp [8] avg 1",
        f"{BACKBONE} mlp [16] avg 1",
    ]
    assert inline.calls == [[1, 3]]
    assert len(list((tmp_path / "heads").glob("*.safetensors"))) == 2
    # A later session keeps what is there, and takes a better probe.
    keep_heads(tmp_path, space, trials, features, context, WORKERS)
    assert inline.calls == [[1, 3]]
    keep_heads(tmp_path, space, [*trials, probe(7, 0.7)], features, context, WORKERS)
    assert inline.calls == [[1, 3], [7]]
    index = json.loads((tmp_path / "heads" / "index.json").read_text())
    assert sorted(index.values()) == [3, 7]


def test_nothing_is_kept_for_a_space_that_does_not_ask(
    context: Context, features: dict[FeatureRequest, str], inline: _InlineRay, tmp_path: Path
) -> None:
    space = finetune_space(head_start="random")
    assert keep_heads(tmp_path, space, [probe(0, 0.4)], features, context, WORKERS) == []
    assert inline.calls == [] and not (tmp_path / "heads").exists()


def test_a_probe_that_diverges_now_is_not_kept(
    context: Context, inline: _InlineRay, tmp_path: Path
) -> None:
    np.save(tmp_path / "matrix.npy", np.full((N, D), np.nan, dtype=np.float32))
    features = {request_of(TrialConfig(backbone=BACKBONE)): str(tmp_path)}
    wild = probe(0, 0.4)
    without = keep_heads(tmp_path, finetune_space(), [wild], features, context, WORKERS)
    assert without == [f"{BACKBONE} linear avg 1"]
    assert not list(tmp_path.glob("heads/*.safetensors"))


def test_which_trials_start_from_a_kept_head(context: Context, tmp_path: Path) -> None:
    mine = dataclasses.replace(context, folder=tmp_path)
    wanted = TrialConfig(backbone=BACKBONE, mode="finetune", head_start="probe")
    assert head_state_for(mine, wanted) is None, "none was kept"
    path = head_path(tmp_path, wanted)
    path.parent.mkdir()
    from safetensors.torch import save_file

    save_file({"mean_D": torch.zeros(D)}, path)

    def starts(**settings: Any) -> bool:
        return head_state_for(mine, dataclasses.replace(wanted, **settings)) is not None

    assert starts()
    assert starts(lr=0.5, dropout=0.5, seed=9, image_size=96), "the same head for all of these"
    assert not starts(head_start="random")
    for other in (
        {"backbone": "mobilenet_v2"},
        {"head": "csra"},
        {"head": "mlp", "hidden_sizes": (8,)},
        {"pooling": "max"},
        {"blocks": 2},
    ):
        assert not starts(**other), other


def test_where_features_are_pixels_their_size_counts(tmp_path: Path) -> None:
    small, large = (TrialConfig(backbone="ffn", image_size=size) for size in (32, 64))
    assert head_path(tmp_path, small) != head_path(tmp_path, large)
    csra = TrialConfig(backbone=BACKBONE, head="csra")
    assert head_path(tmp_path, csra) == head_path(tmp_path, dataclasses.replace(csra, blocks=2))


def test_train_heads_serves_several_requests_at_once(
    context: Context, features: dict[FeatureRequest, str], tmp_path: Path
) -> None:
    """Probes of two feature sets in one job, each trained on its own."""
    (folder,) = features.values()
    wide = tmp_path / "wide"
    wide.mkdir()
    matrix_ND = np.load(Path(folder) / "matrix.npy")
    np.save(wide / "matrix.npy", np.concatenate([matrix_ND, matrix_ND**2], 1))
    probes = [
        Probe(number=0, config=config_of(context, probe(0, 0.4)), features={"plain": folder}),
        Probe(
            number=1,
            config=config_of(context, probe(1, 0.4, pooling="avg_max")),
            features={"plain": str(wide)},
        ),
    ]
    assert train_heads(context, probes, tmp_path) == {0, 1}
    mine = dataclasses.replace(context, folder=tmp_path)
    for pooling, size in (("avg", D), ("avg_max", 2 * D)):
        config = TrialConfig(
            backbone=BACKBONE, mode="finetune", head_start="probe", pooling=pooling
        )
        state = head_state_for(mine, config)
        assert state is not None
        assert state["layers.0.weight"].shape == (C, size)
        assert state["mean_D"].shape == (size,)


def test_fine_tuning_begins_where_its_probe_ended(context: Context, tmp_path: Path) -> None:
    """Before anything has moved, the classifier answers on pictures as the probe on features."""
    from core.encoding.encoders import build_encoder
    from core.encoding.features import encode
    from core.finetuning.finetune import finetune

    chance = np.random.default_rng(3)
    rows_C = chance.integers(0, 256, size=(C, 3))
    targets_NC = torch.from_numpy(context.table.targets_NC).float()
    # Each label adds its colour, so that there is something to learn.
    colours_N3 = np.clip(context.table.targets_NC @ rows_C, 0, 255)
    noise = chance.integers(0, 40, size=(N, 32, 32, 3))
    pictures = np.clip(colours_N3[:, None, None, :] + noise, 0, 255).astype(np.uint8)
    encoder = build_encoder(BACKBONE, weights="none", input_size=32, seed=0)
    features_ND = encode(encoder, pictures, pooling="avg", blocks=1, device="cpu")
    np.save(tmp_path / "matrix.npy", features_ND.numpy())

    record = probe(2, 0.5, image_size=32, epochs=8)
    (outcome,) = train_probes(
        features_ND.numpy(), targets_NC, context.split.pairs(), [config_of(context, record)],
        order_seed=context.seed,
    )  # fmt: skip
    best = Probe(number=2, config=config_of(context, record), features={"plain": str(tmp_path)})
    assert train_heads(context, [best], tmp_path) == {2}
    config = TrialConfig(
        backbone=BACKBONE, mode="finetune", head_start="probe", image_size=32, lr=1e-12,
        unfrozen_stages=1, epochs=1, batch_size=32,
    )  # fmt: skip
    train, validation = context.split.pairs()[0]

    def best_value(start: TrialConfig) -> float:
        mine = dataclasses.replace(context, folder=tmp_path)
        tuned = finetune(
            build_encoder(BACKBONE, weights="none", input_size=32, seed=0), pictures, targets_NC,
            train, validation, start, report=lambda *_: False,
            head_state=head_state_for(mine, start),
        )  # fmt: skip
        assert tuned.best_value is not None
        return tuned.best_value

    assert outcome.best_value is not None and outcome.best_value > 0.62
    assert best_value(config) == pytest.approx(outcome.best_value, abs=0.02)
    random = best_value(dataclasses.replace(config, head_start="random"))
    assert random < outcome.best_value - 0.03
