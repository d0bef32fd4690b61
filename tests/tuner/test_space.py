"""Search spaces: what YAML means, what Optuna is asked, the way back, and what is counted."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import TrialConfig
from core.errors import InputError
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace, load_space

FULL = """
description: All forms there are.
sampler: {name: random}
pruner: none
trials: 7
parameters:
  hidden_sizes: {choice: [[256], [512, 128]], when: {head: mlp}}   # before what it depends on
  head: {choice: [linear, mlp]}
  backbone: [ffn, squeezenet1_1, onnx/some.onnx]
  optimizer: [sgd, adam, adamw]
  lr:
    - {when: {optimizer: sgd}, low: 1e-3, high: 10, log: true}
    - {when: {optimizer: [adam, adamw]}, low: 1.0e-5, high: .1, log: true}
  momentum: {when: {optimizer: sgd, head: mlp}, low: 0, high: 0.9, step: 0.3}
  batch_size: {low: 64, high: 512, step: 64}
  weight_decay:
    - {when: {optimizer: sgd}, constant: 0}
    - {low: 1, high: 2}
  image_size: [null, 160]
  epochs: 12
  class_weights: {constant: none}
"""


def load(folder: Path, text: str) -> SearchSpace:
    path = folder / "my.yaml"
    path.write_text(text)
    return load_space(path)


def ask(space: SearchSpace, num_trials: int, seed: int = 0) -> list[tuple[dict[str, Any], Any]]:
    """Settings and Optuna's frozen trial of `num_trials` random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found = [space.suggest(study.ask()) for _ in range(num_trials)]
    return list(zip(found, study.get_trials(deepcopy=False), strict=True))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    return load(tmp_path_factory.mktemp("space"), FULL)


def test_top_level_and_defaults(full: SearchSpace, tmp_path: Path) -> None:
    assert (full.name, full.trials, full.sampler.name, full.pruner.name) == (
        "my",
        7,
        "random",
        "none",
    )
    plain = load(tmp_path, "parameters: {backbone: ffn}")
    assert (plain.mode, plain.objective, plain.description) == ("probe", "top3_accuracy", "")
    assert (plain.sampler.name, plain.pruner.name) == ("tpe", "successive_halving")
    assert plain.max_epochs == TrialConfig(backbone="ffn").epochs
    assert load(tmp_path, "{name: x, parameters: {backbone: ffn, epochs: [3, 9]}}").max_epochs == 9
    assert load(tmp_path, "parameters: {backbone: ffn, epochs: {low: 2, high: 8}}").max_epochs == 8


def test_what_optuna_is_asked(full: SearchSpace) -> None:
    floats = optuna.distributions.FloatDistribution
    expected: dict[str, Any] = {
        "head": optuna.distributions.CategoricalDistribution(("linear", "mlp")),
        "hidden_sizes": optuna.distributions.CategoricalDistribution(("[256]", "[512, 128]")),
        "backbone": optuna.distributions.CategoricalDistribution(
            ("ffn", "squeezenet1_1", "onnx/some.onnx")
        ),
        "optimizer": optuna.distributions.CategoricalDistribution(("sgd", "adam", "adamw")),
        "lr|optimizer=sgd": floats(1e-3, 10, log=True),
        "lr|optimizer=adam,adamw": floats(1e-5, 0.1, log=True),
        "momentum": floats(0, 0.9, step=0.3),
        "batch_size": optuna.distributions.IntDistribution(64, 512, step=64),
        "weight_decay|otherwise": floats(1, 2),
        "image_size": optuna.distributions.CategoricalDistribution((None, 160)),
    }
    asked: dict[str, Any] = {}
    for _, trial in ask(full, 60):
        asked |= trial.distributions
    assert asked == expected


def test_conditions_hold_in_every_trial(full: SearchSpace) -> None:
    seen = set()
    for values, trial in ask(full, 200):
        sgd, mlp = values["optimizer"] == "sgd", values["head"] == "mlp"
        seen.add((sgd, mlp))
        assert ("hidden_sizes" in values) == mlp
        assert ("momentum" in values) == (sgd and mlp)
        assert values["weight_decay"] == 0 if sgd else 1 <= values["weight_decay"] <= 2
        assert (1e-3 <= values["lr"] <= 10) if sgd else (1e-5 <= values["lr"] <= 0.1)
        assert ("lr|optimizer=sgd" in trial.params) == sgd
        assert values["batch_size"] in range(64, 513, 64)
        assert (values["epochs"], values["class_weights"], values["mode"]) == (12, "none", "probe")
        assert TrialConfig.from_dict(values).to_dict() | values == (
            TrialConfig.from_dict(values).to_dict()
        )
    assert len(seen) == 4


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_there_and_back(full: SearchSpace, seed: int) -> None:
    ((values, trial),) = ask(full, 1, seed)
    assert full.from_params(trial.params) == values
    assert full.from_params(full.to_params(values)) == values
    assert full.to_params(values) == {
        # Optuna's steps are inexact: 0.3 * 3 is 0.8999999999999999.
        key: round(value, 9) if key == "momentum" else value
        for key, value in trial.params.items()
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(full.to_params(values))
    assert full.suggest(study.ask()) == values


def test_a_partial_point_is_completed_by_the_sampler(full: SearchSpace) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(full.to_params({"optimizer": "sgd", "lr": 0.5, "image_size": None}))
    values = full.suggest(study.ask())
    assert (values["optimizer"], values["lr"], values["image_size"]) == ("sgd", 0.5, None)
    assert set(values) >= {"head", "backbone", "batch_size", "epochs"}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"optimiser": "sgd"}, "optimiser: unknown parameter .*\n.*did you mean optimizer"),
        ({"optimizer": "rmsprop"}, "optimizer: 'rmsprop' is outside .*adamw"),
        ({"optimizer": "sgd", "lr": 11}, "lr: 11.0 is outside .*'high': 10"),
        ({"lr": 0.01}, "lr: it needs optimizer to be given too"),
        ({"weight_decay": 1.5}, "weight_decay: it needs optimizer to be given too"),
        ({"optimizer": "sgd", "momentum": 0.3}, "momentum: it needs head to be given too"),
        ({"optimizer": "adam", "momentum": 0.3}, "momentum: it does not exist beside the other"),
        ({"head": "mlp", "hidden_sizes": [128]}, r"hidden_sizes: \[128\] is outside"),
        ({"batch_size": 65}, "batch_size: 65 is outside"),
        ({"batch_size": 64.5}, "batch_size: expected a whole number"),
        ({"epochs": 13}, "epochs: 13 is outside {'constant': 12}"),
        ({"mode": "finetune"}, "mode: it is for mode 'probe'"),
    ],
)
def test_a_point_that_does_not_fit(full: SearchSpace, point: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        full.to_params(point)


def test_params_of_another_space_are_refused(full: SearchSpace) -> None:
    _, trial = ask(full, 1)[0]
    with pytest.raises(InputError, match=r"space my: the trial's gamma are not part of it"):
        full.from_params(trial.params | {"gamma": 1.0})
    with pytest.raises(InputError, match=r"batch_size: 65 is outside .*'step': 64"):
        full.from_params(trial.params | {"batch_size": 65})
    less = {k: v for k, v in trial.params.items() if k != "batch_size"}
    with pytest.raises(InputError, match=r"space my: the trial has no 'batch_size'"):
        full.from_params(less)


def test_yaml_means_what_it_says(tmp_path: Path) -> None:
    """YAML 1.2: exponents without a dot are numbers; no, on and off are words; 010 is ten."""
    space = load(
        tmp_path, "{name: off, parameters: {backbone: ffn, lr: [1e-3, 2E2], batch_size: 010}}"
    )
    values, _ = ask(space, 1)[0]
    assert space.name == "off"
    assert space.parameters["lr"].to_dict() == {"choice": [0.001, 200.0]}
    assert values["batch_size"] == 10


def test_size_counts_configurations_with_their_conditions(tmp_path: Path) -> None:
    space = load(
        tmp_path,
        """
parameters:
  backbone: [ffn, vgg16, resnet50]
  head: [linear, mlp, csra]
  hidden_sizes: {when: {head: mlp}, choice: [[8], [16], [8, 8]]}
  dropout: {when: {head: [linear, mlp]}, low: 0, high: 0.5, step: 0.25}
  csra_lambda: {when: {head: csra, backbone: [vgg16, resnet50]}, choice: [0.1, 0.2]}
  optimizer: [sgd, adam]
  momentum: {when: {optimizer: sgd}, low: 0.5, high: 0.5}
  batch_size: {low: 10, high: 12}
""",
    )
    expected = 0
    for backbone, head, _optimizer, _batch_size in itertools.product(
        range(3), ("linear", "mlp", "csra"), range(2), range(3)
    ):
        if head == "csra":
            expected += 2 if backbone else 1
        else:
            expected += 3 * (3 if head == "mlp" else 1)
    assert space.size() == expected
    configurations = [tuple(sorted(params.items(), key=str)) for params in space.configurations()]
    assert len(configurations) == len(set(configurations)) == expected
    for params in itertools.islice(space.configurations(), 50):
        TrialConfig.from_dict(space.from_params(params))


def test_a_space_with_a_real_range_has_no_size(full: SearchSpace) -> None:
    assert full.size() is None
    assert full.endless() == ["lr", "weight_decay"]


def test_written_out_and_read_back(full: SearchSpace) -> None:
    again = parse_space(full.to_dict())
    assert again == full
    assert again.fingerprint() == full.fingerprint()
    assert [v for v, _ in ask(again, 20)] == [v for v, _ in ask(full, 20)]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("trials: 7", "trials: 70", True),
        ("description: All", "description: Not all", True),
        ("{name: random}", "{name: tpe, startup_trials: 3}", True),
        ("high: 10,", "high: 11,", False),
        ("epochs: 12", "epochs: 13", False),
        ("pruner: none", "objective: mean_average_precision", False),
        ("optimizer: [adam, adamw]", "optimizer: [adamw, adam]", False),
        ("1e-3", "0.001", True),
    ],
)
def test_fingerprint_is_of_what_decides_the_trials(
    full: SearchSpace, tmp_path: Path, old: str, new: str, same: bool
) -> None:
    changed = load(tmp_path, FULL.replace(old, new))
    assert old in FULL
    assert (changed.fingerprint() == full.fingerprint()) == same


def test_points_are_kept(tmp_path: Path) -> None:
    text = "{parameters: {backbone: ffn, lr: {low: 0.1, high: 1}}, points: [{lr: 0.5}, {}]}"
    space = load(tmp_path, text)
    assert [space.to_params(point) for point in space.points] == [{"lr": 0.5}, {}]


def test_importing_spaces_is_light() -> None:
    code = (
        "import sys, tuner.spaces.space, tuner.spaces.file; "
        "import tuner.sampling.samplers, tuner.sampling.pruners; "
        "heavy = {'torch', 'optuna', 'ray', 'mlflow', 'torchvision'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"
