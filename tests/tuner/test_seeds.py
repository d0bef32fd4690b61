"""Which probes seed a fine-tuning study, and what of their settings its first points hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from core.config import TrialConfig
from tuner.home import Home
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.parts import begin_finetune_study, finetune_study, studies_of
from tuner.studies.seeds import choose_seeds, seeds_text
from tuner.studies.study import Study, StudyRecord, TrialRecord, create_study, open_study

PROBE = {
    "parameters": {
        "backbone": ["squeezenet1_1", "mobilenet_v2", "onnx/a.onnx"],
        "head": ["linear", "mlp"],
        "hidden_sizes": {"when": {"head": "mlp"}, "choice": [[256], [512]]},
        "optimizer": ["sgd", "adamw"],
        "lr": {"low": 1e-4, "high": 10, "log": True},
        "weight_decay": {"low": 0.01, "high": 30, "log": True},
        "momentum": {"when": {"optimizer": "sgd"}, "low": 0.0, "high": 0.9},
        "batch_size": [64, 256],
        "epochs": 30,
    }
}
FINETUNE = {
    "from_probes": 3,
    "parameters": {
        "backbone": ["mobilenet_v2", "squeezenet1_1"],
        "head": ["linear", "mlp"],
        "hidden_sizes": {"when": {"head": "mlp"}, "choice": [[256], [128]]},
        "dropout": {"low": 0.0, "high": 0.5},
        "loss": ["bce", "cross_entropy"],
        "optimizer": ["adamw", "adam"],
        "lr": {"low": 1e-5, "high": 1e-3, "log": True},
        "head_lr_multiplier": {"low": 1, "high": 30, "log": True},
        "weight_decay": {"low": 0.001, "high": 1.0, "log": True},
        "schedule": ["cosine", "one_cycle"],
        "warmup_fraction": {"low": 0.05, "high": 0.4},
        "batch_size": [32, 64],
        "unfrozen_stages": [1, 2],
        "horizontal_flip": True,
        "epochs": 4,
    },
}
LINEAR = {
    "mode": "probe", "backbone": "squeezenet1_1", "head": "linear", "optimizer": "adamw",
    "lr": 0.002, "weight_decay": 0.1, "batch_size": 64, "epochs": 30,
}  # fmt: skip


def space(**finetune: Any) -> SearchSpace:
    """The two-part space, with other parameters in its second part."""
    parameters = {**FINETUNE["parameters"], **finetune}  # type: ignore[dict-item]
    parameters = {name: value for name, value in parameters.items() if value is not None}
    return parse_space(
        {"name": "s", "probe": PROBE, "finetune": {**FINETUNE, "parameters": parameters}}
    )


def probe(number: int, value: float | None, status: str = "complete", **other: Any) -> TrialRecord:
    return TrialRecord(
        number=number, status=status, reason="", value=value, best_epoch=3, epochs=30,
        seconds=1.0, settings={k: v for k, v in {**LINEAR, **other}.items() if v is not None},
    )  # fmt: skip


def test_a_point_is_what_the_fine_tuning_space_can_express() -> None:
    (seed,) = choose_seeds([probe(7, 0.5)], space())
    point = dict(seed.point)
    # The head learns as fast as the probe did: in the middle of what both ranges allow.
    rates = point.pop("lr"), point.pop("head_lr_multiplier")
    assert rates[0] * rates[1] == pytest.approx(0.002)
    assert rates[0] == pytest.approx((0.002 / 30 * 1e-3) ** 0.5)
    assert point == {
        "backbone": "squeezenet1_1",
        "head": "linear",
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "batch_size": 64,
        # Not searched by the probes, but what they were trained with.
        "dropout": 0.0,
        "loss": "bce",
    }
    assert (seed.number, seed.value) == (7, 0.5)
    assert set(seed.used) == {
        "backbone", "head", "optimizer", "lr", "weight_decay", "batch_size"
    }  # fmt: skip
    assert seed.left_out == ("epochs",)


@pytest.mark.parametrize(
    ("other", "left_out"),
    [
        ({"batch_size": 256}, {"batch_size", "epochs"}),
        ({"weight_decay": 9.0}, {"weight_decay", "epochs"}),
        # Too fast for any rate with any multiplier.
        ({"lr": 0.5}, {"lr", "epochs"}),
        ({"head": "mlp", "hidden_sizes": [256]}, {"epochs"}),
        ({"head": "mlp", "hidden_sizes": [512]}, {"hidden_sizes", "epochs"}),
        # A rate and a decay mean something under their own optimizer alone.
        (
            {"optimizer": "sgd", "momentum": 0.5},
            {"optimizer", "momentum", "lr", "weight_decay", "epochs"},
        ),
    ],
)
def test_what_does_not_fit_is_left_to_the_sampler(other: Any, left_out: set[str]) -> None:
    both = space()
    assert both.finetune is not None
    (seed,) = choose_seeds([probe(0, 0.5, **other)], both)
    assert set(seed.left_out) == left_out
    assert not left_out & seed.point.keys()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(both.finetune.to_params(seed.point))
    settings = both.finetune.suggest(study.ask())
    assert seed.point.items() <= settings.items()
    assert settings["epochs"] == 4 and settings["horizontal_flip"] is True
    TrialConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"head_lr_multiplier": None}, {"lr": None}),
        ({"head_lr_multiplier": None, "lr": [1e-3, 2e-3]}, {"lr": 2e-3}),
        ({"head_lr_multiplier": 4}, {"lr": 5e-4, "head_lr_multiplier": 4.0}),
        ({"lr": 1e-4}, {"lr": 1e-4, "head_lr_multiplier": 20.0}),
        ({"lr": [1e-5, 1e-4]}, {"lr": 1e-4, "head_lr_multiplier": 20.0}),
        ({"lr": None}, {"lr": None, "head_lr_multiplier": 2.0}),
        # Where heads are trained already, the rate that trained them would undo them.
        ({"head_start": "probe"}, {"lr": None, "head_lr_multiplier": None, "weight_decay": 0.1}),
        ({"head_start": ["probe", "random"], "head_lr_multiplier": 4}, {"lr": 5e-4}),
        (
            {
                "optimizer": ["adam", "adamw"],
                "lr": [
                    {"when": {"optimizer": "adam"}, "low": 1e-6, "high": 1e-3},
                    {"low": 1e-4, "high": 2e-4},
                ],
            },
            {"lr": (1e-4 * 2e-4) ** 0.5, "head_lr_multiplier": 2e-3 / (1e-4 * 2e-4) ** 0.5},
        ),
    ],
)
def test_the_head_learns_at_the_probes_rate(rates: Any, expected: dict[str, float | None]) -> None:
    (seed,) = choose_seeds([probe(0, 0.5)], space(**rates))
    for name, value in expected.items():
        if value is None:
            assert name not in seed.point
        else:
            assert seed.point[name] == pytest.approx(value)


def test_the_best_complete_distinct_probes_of_known_backbones() -> None:
    probes = [
        probe(0, 0.40),
        probe(1, 0.90, "pruned"),
        probe(2, None, "failed"),
        probe(3, 0.70, backbone="onnx/a.onnx"),
        probe(4, 0.60, lr=5.0),
        probe(5, 0.50, lr=6.0),  # its rate is left out: the same point as 4
        probe(6, 0.60, backbone="mobilenet_v2"),
        probe(7, 0.30),
    ]
    assert [seed.number for seed in choose_seeds(probes, space())] == [4, 6, 0]
    assert choose_seeds([], space()) == []
    assert [seed.number for seed in choose_seeds(probes[:5], space())] == [4, 0]


def test_used_and_left_out_are_counted_for_people() -> None:
    seeds = choose_seeds([probe(4, 0.6, batch_size=256), probe(9, 0.5)], space())
    assert seeds_text(seeds) == (
        "fine-tuning starts from probes 4, 9: 11 of their settings used, 3 left out "
        "(epochs 2x, batch_size 1x)"
    )
    assert "its first trials are free" in seeds_text([])


# ---- the study that goes on from them ------------------------------------------------------------


def a_study(home: Home, both: SearchSpace) -> Study:
    study = create_study(
        home,
        StudyRecord(
            name="mine", space=both.to_dict(), data={"data": "here"}, skipped=(), fingerprint="f",
            num_folds=None, seed=3, trials=9, storage=None, tracking_uri="sqlite:///x", model="m",
            weights="none", weights_dir=None, finetune_trials=6,
        ),
    )  # fmt: skip
    study.split_path.write_text("{}")
    return study


def test_the_second_study_goes_on_from_the_first(tmp_path: Path) -> None:
    home = Home(root=tmp_path)
    study = a_study(home, space())
    assert finetune_study(home, study) is None
    assert studies_of(home, study) == [study]
    seeds = choose_seeds([probe(4, 0.6), probe(9, 0.5, lr=0.003)], study.space())
    begun = begin_finetune_study(home, study, seeds)
    record = begun.record
    assert (record.name, record.after, record.trials) == ("mine-finetune", "mine", 6)
    assert (record.finetune_trials, record.seed, record.model) == (None, 3, "m")
    assert begun.space().mode == "finetune"
    assert begun.space().points == tuple(seed.point for seed in seeds)
    assert begun.split_path.read_text() == "{}"
    kept = json.loads((begun.folder / "seeds.json").read_text())
    left_out = {seed["number"]: seed["left_out"] for seed in kept}
    assert left_out == {4: ["epochs"], 9: ["epochs"]}
    assert open_study(home, "mine-finetune").record == record
    found = finetune_study(home, study)
    assert found is not None and found.record == record
    assert [part.record.name for part in studies_of(home, study)] == ["mine", "mine-finetune"]


def test_a_half_made_second_study_is_completed(tmp_path: Path) -> None:
    home = Home(root=tmp_path)
    study = a_study(home, space())
    (home.studies / "mine-finetune").mkdir()
    assert finetune_study(home, study) is None
    begun = begin_finetune_study(home, study, [])
    assert finetune_study(home, study) is not None
    assert begun.space().points == ()


def test_records_of_earlier_versions_open(tmp_path: Path) -> None:
    home = Home(root=tmp_path)
    alone = parse_space({"name": "s", "mode": "finetune", "parameters": FINETUNE["parameters"]})
    path = a_study(home, alone).folder / "study.json"
    values = json.loads(path.read_text())
    for name in ("after", "finetune_trials"):
        del values[name]
    path.write_text(json.dumps(values))
    study = open_study(home, "mine")
    assert (study.record.after, study.record.finetune_trials) == (None, None)
    assert study.space() == alone
