"""Fine-tuning: what is trained and what is not, stops, repeatability, and the weights kept.

N rows, D features, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from core.config import TrialConfig
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.inputs import feature_statistics
from core.encoding.pooling import num_head_features
from core.errors import InputError
from core.finetuning.finetune import finetune
from core.head_settings import head_settings
from core.heads import build_head
from core.metrics import topk_recall
from core.models.classifier import PictureClassifier
from core.report import Metrics, Outcome, Status

from .tiny_finetuning import SIZE, TRAIN, VALIDATION, C
from .tiny_finetuning import config as _config
from .tiny_finetuning import data as _data
from .tiny_finetuning import encoder as _encoder
from .tiny_finetuning import images as _images

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = _config()


def _keep_going(epoch: int, metrics: Metrics) -> bool:
    return False


def _finetune(encoder: Encoder, config: TrialConfig = CONFIG, **settings: Any) -> Outcome:
    pictures, targets_NC = _data()
    settings = {"report": _keep_going, **settings}
    return finetune(encoder, pictures, targets_NC, TRAIN, VALIDATION, config, **settings)


def _weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _logits(outcome: Outcome, encoder: Encoder, config: TrialConfig) -> Tensor:
    """Validation logits of the state that was kept, loaded into a new classifier."""
    reads = {"pooling": config.pooling, "blocks": config.blocks}
    size = num_head_features(encoder, spatial=config.head == "csra", **reads)
    head = build_head(num_features=size, num_classes=C, **head_settings(config))
    model = PictureClassifier(encoder, head, **reads).eval()
    assert outcome.state is not None
    model.load_state_dict(outcome.state)
    with torch.no_grad():
        return model(_images(_data()[0][VALIDATION]))


def _same(first: Outcome, second: Outcome) -> bool:
    assert first.state is not None
    assert second.state is not None
    return first.curve == second.curve and all(
        torch.equal(value, second.state[name]) for name, value in first.state.items()
    )


@pytest.mark.parametrize("unfrozen", [0, 1, 2, 4, 9])
def test_only_the_unfrozen_stages_change(unfrozen: int) -> None:
    encoder = _encoder()
    before = [_weights(stage) for stage in encoder.stages()]
    assert len(before) == 4
    config = dataclasses.replace(CONFIG, unfrozen_stages=unfrozen)
    outcome = _finetune(encoder, config)
    assert outcome.status is Status.COMPLETE
    for place, stage in enumerate(encoder.stages()):
        changed = [
            not torch.equal(a, b) for a, b in zip(before[place], stage.parameters(), strict=True)
        ]
        assert changed == [place >= 4 - unfrozen] * len(changed)


def test_statistics_of_batch_norm_stay() -> None:
    encoder = _encoder()
    before = {name: b.clone() for name, b in encoder.named_buffers() if "running" in name}
    assert len(before) == 8
    outcome = _finetune(encoder, dataclasses.replace(CONFIG, unfrozen_stages=4))
    after = dict(encoder.named_buffers())
    assert outcome.state is not None
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer)
        assert torch.equal(outcome.state[f"encoder.{name}"], buffer)


def test_training_learns_and_every_epoch_is_reported() -> None:
    heard: list[tuple[int, Metrics]] = []

    def report(epoch: int, metrics: Metrics) -> bool:
        heard.append((epoch, metrics))
        return False

    config = dataclasses.replace(CONFIG, epochs=8)
    outcome = _finetune(_encoder(), config, report=report)
    assert [epoch for epoch, _ in heard] == list(range(1, 9))
    assert [metrics for _, metrics in heard] == list(outcome.curve)
    assert set(outcome.curve[0]) == {
        "train_loss",
        "train_top3_accuracy",
        "validation_loss",
        "validation_top3_accuracy",
        "lr",
    }
    assert outcome.curve[-1]["train_loss"] < 0.8 * outcome.curve[0]["train_loss"]
    assert outcome.reason == ""
    assert outcome.seconds > 0


@pytest.mark.parametrize("head", ["linear", "mlp", "csra"])
@pytest.mark.parametrize(("pooling", "blocks"), [("avg", 1), ("max", 1), ("avg_max", 2)])
@pytest.mark.parametrize("feature_norm", ["standardize", "none"])
def test_the_state_kept_gives_the_best_epochs_metrics(
    head: str, pooling: str, blocks: int, feature_norm: str
) -> None:
    config = dataclasses.replace(
        CONFIG,
        head=head,
        hidden_sizes=(6,) if head == "mlp" else (),
        pooling=pooling,
        blocks=blocks,
        feature_norm=feature_norm,
        epochs=4,
        lr=0.05,
    )
    outcome = _finetune(_encoder(), config)
    values = [metrics["validation_top3_accuracy"] for metrics in outcome.curve]
    assert outcome.best_value == max(values)
    assert outcome.best_epoch == values.index(max(values)) + 1
    targets_NC = _data()[1][VALIDATION]
    logits_NC = _logits(outcome, _encoder(), config)
    assert float(topk_recall(logits_NC, targets_NC)) == outcome.best_value
    expected = average_precision_score(targets_NC, logits_NC, average="macro")
    found = outcome.best_metrics["validation_mean_average_precision"]
    assert found == pytest.approx(expected, abs=1e-6)


def test_scaling_of_several_stages_comes_from_each_of_them() -> None:
    """Maps of the last two of four blocks, by hand."""
    encoder = _encoder()
    with torch.no_grad():
        x = (_images(_data()[0]) - encoder.mean) / encoder.std
        third = encoder.network[:3](x)
        maps = (third, encoder.network[3](third))
        features = torch.cat([p for m in maps for p in (m.mean((2, 3)), m.amax((2, 3)))], 1)
    outcome = _finetune(encoder, dataclasses.replace(CONFIG, pooling="avg_max", blocks=2))
    mean_D, deviation_D = feature_statistics(features.numpy(), TRAIN)
    assert outcome.state is not None
    torch.testing.assert_close(outcome.state["mean_D"], mean_D)
    torch.testing.assert_close(outcome.state["deviation_D"], deviation_D)


@pytest.mark.parametrize("head", ["linear", "csra"])
def test_scaling_comes_from_the_training_pictures_before_training(head: str) -> None:
    """Of pooled features, or of every place for a head that reads the map."""
    encoder = _encoder()
    with torch.no_grad():
        map_NDhw = encoder(_images(_data()[0]))
    features = map_NDhw.flatten(2).transpose(1, 2) if head == "csra" else map_NDhw.mean((2, 3))
    outcome = _finetune(encoder, dataclasses.replace(CONFIG, head=head))
    mean_D, deviation_D = feature_statistics(features.numpy(), TRAIN)
    assert outcome.state is not None
    torch.testing.assert_close(outcome.state["mean_D"], mean_D)
    torch.testing.assert_close(outcome.state["deviation_D"], deviation_D)


def test_the_objective_chooses_the_best_epoch() -> None:
    config = dataclasses.replace(CONFIG, epochs=6, lr=0.05)
    outcome = _finetune(_encoder(), config, objective="mean_average_precision")
    values = [metrics["validation_mean_average_precision"] for metrics in outcome.curve]
    assert outcome.best_value == max(values)
    logits_NC = _logits(outcome, _encoder(), config)
    expected = average_precision_score(_data()[1][VALIDATION], logits_NC, average="macro")
    assert outcome.best_value == pytest.approx(expected, abs=1e-6)


def test_it_stops_when_told() -> None:
    outcome = _finetune(_encoder(), report=lambda epoch, metrics: epoch == 2)
    assert outcome.status is Status.PRUNED
    assert outcome.reason == "pruned at epoch 2"
    assert len(outcome.curve) == 2
    assert outcome.best_metrics == {}
    assert outcome.curve == _finetune(_encoder()).curve[:2]


def test_a_stop_in_the_last_epoch_is_complete() -> None:
    outcome = _finetune(_encoder(), report=lambda epoch, metrics: epoch == CONFIG.epochs)
    assert outcome.status is Status.COMPLETE
    assert outcome.best_metrics


def test_divergence_fails_with_its_reason() -> None:
    config = dataclasses.replace(CONFIG, optimizer="sgd", lr=1e30)
    outcome = _finetune(_encoder(), config)
    assert outcome.status is Status.FAILED
    assert outcome.reason.startswith("diverged in epoch 1: ")
    assert "nan" in outcome.reason
    assert outcome.curve == ()
    assert outcome.state is None


@pytest.mark.parametrize(
    "change",
    [{}, {"dropout": 0.4}, {"horizontal_flip": True}, {"class_weights": "inverse"}],
    ids=str,
)
def test_a_run_depends_on_its_seeds_alone(change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    torch.manual_seed(1)
    np.random.seed(1)
    first = _finetune(_encoder(), config)
    if change:  # it is not without effect
        assert not _same(first, _finetune(_encoder()))
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    assert _same(first, _finetune(_encoder(), config))
    assert torch.equal(torch.get_rng_state(), before)
    assert not _same(first, _finetune(_encoder(), dataclasses.replace(config, seed=1)))
    assert not _same(first, _finetune(_encoder(), config, order_seed=1))


def test_flips_mirror_some_pictures_and_no_targets() -> None:
    """Half of the pictures pass the backbone mirrored while training, none while validating."""
    pictures, _ = _data()
    upright, mirrored = _images(pictures), _images(pictures[:, :, ::-1].copy())
    found: dict[bool, list[int]] = {False: [], True: []}
    encoder = _encoder()

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = VALIDATION if len(inputs[0]) == len(VALIDATION) else TRAIN
        for image in inputs[0]:
            is_upright = any(torch.equal(image, upright[row]) for row in rows)
            is_mirrored = any(torch.equal(image, mirrored[row]) for row in rows)
            assert is_upright != is_mirrored
            found[rows is TRAIN].append(int(is_mirrored))

    encoder.register_forward_pre_hook(note)
    config = dataclasses.replace(CONFIG, horizontal_flip=True, feature_norm="none")
    flipped = _finetune(encoder, config)
    assert len(found[True]) == 3 * len(TRAIN)
    assert 0.3 < np.mean(found[True]) < 0.7
    assert set(found[False]) == {0}
    assert (
        flipped.curve
        != _finetune(_encoder(), dataclasses.replace(config, horizontal_flip=False)).curve
    )


def test_flips_change_from_epoch_to_epoch() -> None:
    """With one picture a batch: it is not mirrored always or never."""
    pictures, targets_NC = _data()
    encoder = _encoder()
    seen: list[bool] = []
    upright = _images(pictures[:1])
    encoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(torch.equal(inputs[0], upright))
    )
    config = dataclasses.replace(
        CONFIG, horizontal_flip=True, feature_norm="none", epochs=12, batch_size=1
    )
    finetune(encoder, pictures, targets_NC, TRAIN[:1], VALIDATION[:4], config, report=_keep_going)
    trained = seen[::2]  # beside each, one validation batch an epoch
    assert len(seen) == 2 * config.epochs
    assert {True, False} == set(trained)


def test_head_and_backbone_have_rates_of_their_own() -> None:
    """A plain loop of torch with a parameter group each is the oracle."""
    config = dataclasses.replace(
        CONFIG,
        optimizer="sgd",
        momentum=0.5,
        lr=0.02,
        head_lr_multiplier=5.0,
        weight_decay=0.1,
        schedule="cosine",
        feature_norm="none",
        unfrozen_stages=1,
    )
    outcome = _finetune(_encoder(), config)
    encoder = _encoder()
    head = build_head(num_features=encoder.num_features, num_classes=C, **head_settings(config))
    groups = [
        {"params": [p], "lr": rate, "weight_decay": 0.1 if p.ndim > 1 else 0.0}
        for module, rate in ((encoder.stages()[-1], 0.02), (head, 0.1))
        for p in module.parameters()
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    pictures, targets_NC = _data()
    for epoch, metrics in enumerate(outcome.curve, 1):
        order = np.random.default_rng([0, epoch]).permutation(TRAIN)
        total = 0.0
        for rows in np.split(order, [12, 24]):
            logits_NC = head(encoder(_images(pictures[rows])).mean((2, 3)))
            loss = nn.functional.binary_cross_entropy_with_logits(logits_NC, targets_NC[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(rows)
        assert metrics["train_loss"] == pytest.approx(total / len(TRAIN), rel=1e-4)
        if epoch == outcome.best_epoch:
            for prefix, module in (("encoder", encoder), ("head", head)):
                for name, weight in module.state_dict().items():
                    found = outcome.state[f"{prefix}.{name}"]
                    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-6)


def test_pictures_may_be_a_read_only_memory_map(tmp_path) -> None:
    pictures, targets_NC = _data()
    np.save(tmp_path / "pictures.npy", pictures)
    mapped = np.load(tmp_path / "pictures.npy", mmap_mode="r")
    outcome = finetune(
        _encoder(), mapped, targets_NC, TRAIN, VALIDATION, CONFIG, report=_keep_going
    )
    assert _same(outcome, _finetune(_encoder()))


def test_a_torchvision_network_is_fine_tuned() -> None:
    """The real thing, at 48 pixels and with random weights."""
    encoder = build_encoder("squeezenet1_1", weights="none", input_size=48)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (12, 48, 48, 3), dtype=np.uint8)
    targets_NC = torch.eye(C).repeat(3, 1)
    before = [_weights(stage) for stage in encoder.stages()]
    config = TrialConfig(
        backbone="squeezenet1_1", mode="finetune", unfrozen_stages=1, epochs=1, batch_size=6
    )
    rows = np.arange(12)
    outcome = finetune(
        encoder, pictures, targets_NC, rows[:8], rows[8:], config, report=_keep_going
    )
    assert outcome.status is Status.COMPLETE
    changed = [
        any(not torch.equal(a, b) for a, b in zip(old, stage.parameters(), strict=True))
        for old, stage in zip(before, encoder.stages(), strict=True)
    ]
    assert changed == [False] * (len(changed) - 1) + [True]


def test_a_backbone_without_parameters_cannot_be_unfrozen() -> None:
    encoder = build_encoder("ffn", weights="none", input_size=SIZE)
    with pytest.raises(InputError, match=r"ffn has no layers that can be trained(.|\n)*probe"):
        _finetune(encoder)
    config = dataclasses.replace(CONFIG, backbone="ffn", unfrozen_stages=0)
    assert _finetune(encoder, config).status is Status.COMPLETE
