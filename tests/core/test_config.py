"""`TrialConfig`: what passes runs, what does not is refused by name, and JSON round trips."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrialConfig
from core.errors import InputError

# One invalid value of each field that has a rule, with words of the message.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": "train"}, "unknown mode 'train'(.|\n)*finetune, probe"),
    ({"pooling": "map"}, "unknown pooling 'map'(.|\n)*avg, avg_max, max"),
    ({"views": "rotate"}, "unknown views 'rotate'(.|\n)*flip, flip_crop, plain"),
    ({"blocks": 0}, "1 <= blocks <= 4"),
    ({"blocks": 5}, "1 <= blocks <= 4"),
    ({"blocks": 2}, "ffn has no stages that can be read, so blocks = 1 must hold"),
    ({"feature_norm": "l2"}, "unknown feature_norm 'l2'"),
    ({"head": "transformer"}, "unknown head 'transformer'(.|\n)*csra, linear, mlp"),
    ({"loss": "hinge"}, "unknown loss 'hinge'"),
    ({"class_weights": "max"}, "unknown class_weights 'max'"),
    ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
    ({"schedule": "step"}, "unknown schedule 'step'"),
    ({"lr": 0}, "lr > 0 must hold, but got lr=0"),
    ({"csra_temperature": 0}, "csra_temperature > 0"),
    ({"head_lr_multiplier": -1}, "head_lr_multiplier > 0"),
    ({"csra_lambda": -0.1}, "csra_lambda >= 0"),
    ({"gamma": -1}, "gamma >= 0"),
    ({"gamma_positive": -1}, "gamma_positive >= 0"),
    ({"gamma_negative": -1}, "gamma_negative >= 0"),
    ({"weight_decay": -1e-9}, "weight_decay >= 0"),
    ({"dropout": 1}, "0 <= dropout < 1"),
    ({"clip": 1}, "0 <= clip < 1"),
    ({"label_smoothing": -0.1}, "0 <= label_smoothing < 1"),
    ({"momentum": 1}, "0 <= momentum < 1"),
    ({"beta1": 1}, "0 <= beta1 < 1"),
    ({"beta2": 1}, "0 <= beta2 < 1"),
    ({"alpha": 1}, "0 <= alpha < 1"),
    ({"warmup_fraction": 1}, "0 <= warmup_fraction < 1"),
    ({"epochs": 0}, "epochs >= 1"),
    ({"batch_size": 0}, "batch_size >= 1"),
    ({"seed": -1}, r"0 <= seed < 2\*\*63"),
    ({"seed": 2**63}, r"0 <= seed < 2\*\*63"),
    ({"unfrozen_stages": -1}, "unfrozen_stages >= 0"),
    ({"unfreeze_epochs": -1}, "unfreeze_epochs >= 0"),
    ({"layer_lr_decay": 0}, "0 < layer_lr_decay <= 1"),
    ({"layer_lr_decay": 1.1}, "0 < layer_lr_decay <= 1"),
    ({"head_start": "best"}, "unknown head_start 'best'(.|\n)*probe, random"),
    ({"accumulation_steps": 0}, "accumulation_steps >= 1"),
    ({"clip_norm": 0}, "clip_norm > 0"),
    ({"clip_norm": "none"}, "finite number"),
    ({"ema_decay": 1}, "0 <= ema_decay < 1"),
    ({"batch_norm": "eval"}, "unknown batch_norm 'eval'(.|\n)*frozen, train"),
    ({"drop_path": 1}, "0 <= drop_path < 1"),
    ({"min_crop_scale": 0}, "0 < min_crop_scale <= 1"),
    ({"min_crop_scale": 1.01}, "0 < min_crop_scale <= 1"),
    ({"randaugment_magnitude": -1}, "0 <= randaugment_magnitude <= 30"),
    ({"randaugment_magnitude": 31}, "0 <= randaugment_magnitude <= 30"),
    ({"randaugment_ops": 0}, "randaugment_ops >= 1"),
    ({"mixup_alpha": -0.1}, "mixup_alpha >= 0"),
    ({"cutmix_alpha": -0.1}, "cutmix_alpha >= 0"),
    ({"image_size": 15}, "image_size >= 16"),
    ({"head": "mlp"}, "at least one hidden layer"),
    ({"hidden_sizes": [8]}, "at least one hidden layer"),
    ({"head": "mlp", "hidden_sizes": [8, 0]}, "every width >= 1"),
    ({"nesterov": True, "optimizer": "sgd"}, r"\(not nesterov\) or momentum > 0"),
    ({"schedule": "one_cycle"}, "one_cycle needs warmup_fraction > 0"),
    ({"lr": float("nan")}, "finite number"),
    ({"lr": float("inf")}, "finite number"),
    ({"lr": "1e-3"}, "finite number"),
    ({"lr": True}, "finite number"),
    ({"epochs": 2.5}, "whole number"),
    ({"epochs": None}, "finite number"),
    ({"nesterov": 1}, "true or false"),
    ({"loss": 3}, "expected a name"),
    ({"hidden_sizes": [8.5]}, "list of whole numbers"),
    ({"hidden_sizes": "8"}, "list of whole numbers"),
    ({"hidden_sizes": [True]}, "list of whole numbers"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(v) for v, _ in REFUSED])
def test_an_invalid_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        TrialConfig.from_dict({"backbone": "ffn", **values})
    assert caught.value.where in {*values, "hidden_sizes", "warmup_fraction"}


def test_every_field_with_a_rule_is_among_the_refused() -> None:
    free = {"backbone", "horizontal_flip"}  # any name; any bool, whose type nesterov's case tests
    fields = {f.name for f in dataclasses.fields(TrialConfig)}
    assert fields - {key for values, _ in REFUSED for key in values} == free


def test_rules_hold_for_direct_construction_too() -> None:
    with pytest.raises(InputError, match="lr > 0"):
        TrialConfig(backbone="ffn", lr=float("nan"))


def test_only_backbones_with_stages_have_several_blocks() -> None:
    for backbone in ("resnet50", "squeezenet1_1", "timm/vit"):
        assert TrialConfig(backbone=backbone, blocks=4).blocks == 4
    with pytest.raises(InputError, match=r"onnx/a\.onnx has no stages"):
        TrialConfig(backbone="onnx/a.onnx", blocks=2)


def test_unknown_and_missing_keys() -> None:
    with pytest.raises(InputError, match=r"unknown parameter 'learning_rate'(.|\n)*lr"):
        TrialConfig.from_dict({"backbone": "ffn", "learning_rate": 0.1})
    with pytest.raises(InputError, match="no backbone is given"):
        TrialConfig.from_dict({"lr": 0.1})


def test_values_get_the_type_of_their_field() -> None:
    config = TrialConfig.from_dict(
        {"backbone": "ffn", "epochs": 3.0, "lr": 1, "head": "mlp", "hidden_sizes": [4, 2]}
    )
    assert config.hidden_sizes == (4, 2)
    assert type(config.epochs) is int
    assert type(config.lr) is float
    assert TrialConfig.from_dict({"backbone": "ffn", "image_size": 64.0}).image_size == 64
    assert TrialConfig.from_dict({"backbone": "ffn", "image_size": None}).image_size is None
    assert (
        TrialConfig.from_dict({"backbone": "ffn", "unfrozen_stages": None}).unfrozen_stages is None
    )
    assert TrialConfig.from_dict({"backbone": "ffn", "clip_norm": None}).clip_norm is None
    assert type(TrialConfig.from_dict({"backbone": "ffn", "clip_norm": 1}).clip_norm) is float
    hash(config)


@given(
    lr=st.floats(1e-9, 1e9),
    epochs=st.integers(1, 10**6),
    hidden_sizes=st.lists(st.integers(1, 4096), max_size=4),
    image_size=st.none() | st.integers(16, 1024),
    nesterov=st.booleans(),
)
def test_a_config_survives_json(
    lr: float, epochs: int, hidden_sizes: list[int], image_size: int | None, nesterov: bool
) -> None:
    config = TrialConfig(
        backbone="timm/vit",
        lr=lr,
        epochs=epochs,
        head="mlp" if hidden_sizes else "csra",
        hidden_sizes=tuple(hidden_sizes),
        image_size=image_size,
        momentum=0.9,
        nesterov=nesterov,
    )
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
