"""Every shipped search space, found by looking into the folder, proposes trials that can run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import optuna
import pytest

from core.config import MODES, TrialConfig
from core.objectives import METRICS
from tuner.spaces.check import FINETUNE_ONLY, PROBE_ONLY
from tuner.spaces.domain import Choice
from tuner.spaces.file import PARTS as PARTS_OF_A_SPACE
from tuner.spaces.file import SpaceSection, TwoPartSection
from tuner.spaces.schema import json_schema, write_schema
from tuner.spaces.source import read_yaml
from tuner.spaces.space import SearchSpace, load_space, shipped_spaces
from tuner.studies.seeds import choose_seeds
from tuner.studies.study import TrialRecord

NUM_TRIALS = 200
SPACES = sorted(shipped_spaces())
STAGED = ("two_stage", "two_stage_small")
PARTS = [*((name, 0) for name in SPACES), *((name, 1) for name in STAGED)]
"""The parts of every space. Loading spaces takes seconds, which finding tests must not."""
FOLDER = Path(__file__).parents[2] / "search_spaces"


def sample(space: SearchSpace) -> tuple[list[dict[str, Any]], optuna.Study]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(NUM_TRIALS)], study


def test_all_spaces_are_found() -> None:
    assert SPACES == ["demo", "finetune", "probe", "seed", "two_stage", "two_stage_small"]
    assert len(PARTS) == sum(len(load_space(name).parts) for name in SPACES)
    assert {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"} == {
        "schema.json",
        *(f"{name}.yaml" for name in SPACES),
    }


@pytest.mark.parametrize(("name", "place"), PARTS)
def test_samples_are_valid_trials(name: str, place: int) -> None:
    space = load_space(name).parts[place]
    points, study = sample(space)
    for point, trial in zip(points, study.get_trials(deepcopy=False), strict=True):
        config = TrialConfig.from_dict(json.loads(json.dumps(point)))
        assert config.mode == space.mode
        assert config.epochs <= space.max_epochs
        assert space.from_params(trial.params) == point
        assert space.to_params(point) == trial.params


@pytest.mark.parametrize(("name", "place"), PARTS)
def test_every_choice_occurs(name: str, place: int) -> None:
    space = load_space(name).parts[place]
    points, study = sample(space)
    stored = {(k, v) for t in study.get_trials(deepcopy=False) for k, v in t.params.items()}
    num_choices = 0
    for parameter in space.parameters.values():
        for branch in parameter.branches:
            if isinstance(branch.domain, Choice):
                for option in branch.stored_options():
                    assert (branch.key, option) in stored
                    num_choices += 1
            else:
                assert any(parameter.name in point for point in points)
    assert num_choices >= 4


@pytest.mark.parametrize("name", SPACES)
def test_file_says_what_it_is_and_names_its_schema(name: str) -> None:
    path = shipped_spaces()[name]
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert load_space(name).description


def test_the_seed_comparison_is_ten_trials() -> None:
    space = load_space("seed")
    assert space.size() == space.trials == 10
    settings = [space.from_params(params) for params in space.configurations()]
    assert {(s["backbone"], s["loss"]) for s in settings} == {
        (backbone, loss)
        for backbone in ("ffn", "vgg16", "resnet50", "inception_v3", "efficientnet_b0")
        for loss in ("bce", "cross_entropy")
    }
    for s in settings:
        if s["backbone"] == "ffn":
            assert (s["head"], s["hidden_sizes"]) == ("mlp", [1024, 512, 256])
            assert (s["optimizer"], s["lr"]) == ("sgd", 0.05)
        else:
            assert (s["head"], s["optimizer"], s["lr"]) == ("linear", "adam", 1e-4)


@pytest.mark.parametrize("name", STAGED)
def test_every_probe_of_two_parts_can_seed_its_fine_tuning(name: str) -> None:
    """Backbone, head and loss are all expressed; only what the file says is left out is."""
    space = load_space(name)
    assert space.finetune is not None
    probes, _ = sample(space)
    records = [
        TrialRecord(
            number=number, status="complete", reason="", value=1 - number / NUM_TRIALS,
            best_epoch=1, epochs=30, seconds=1.0, settings=settings,
        )
        for number, settings in enumerate(probes)
    ]  # fmt: skip
    seeds = choose_seeds(records, dataclasses.replace(space, from_probes=NUM_TRIALS))
    assert [seed.number for seed in seeds] == list(range(NUM_TRIALS))
    for seed, probe in zip(seeds, probes, strict=True):
        for name in ("backbone", "head", "hidden_sizes", "loss", "optimizer"):
            assert seed.point.get(name) == probe.get(name)
        assert set(seed.left_out) <= {"batch_size", "epochs", "lr", "weight_decay"}
        space.finetune.to_params(seed.point)


def test_settings_of_one_mode_say_so() -> None:
    """What is refused in a probe is what `TrialConfig` says fine-tuning alone reads, and back."""
    properties = json_schema()["$defs"]["parameters"]["properties"]

    def read_by(mode: str) -> set[str]:
        return {n for n, v in properties.items() if v["description"].startswith(f"`{mode}`: ")}

    assert read_by("finetune") == set(FINETUNE_ONLY)
    assert read_by("probe") == set(PROBE_ONLY)


def test_schema_is_up_to_date(tmp_path: Path) -> None:
    write_schema(tmp_path / "schema.json")
    assert (tmp_path / "schema.json").read_text() == (FOLDER / "schema.json").read_text(), (
        "write it anew: python -c 'from pathlib import Path; from tuner.spaces.schema import "
        'write_schema; write_schema(Path("search_spaces/schema.json"))\''
    )


@pytest.mark.parametrize("name", SPACES)
def test_shipped_spaces_fit_the_schema(name: str) -> None:
    values, _ = read_yaml(shipped_spaces()[name])
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    assert list(validator.iter_errors(values)) == []
    # What `space.to_dict()` writes (and a study stores) is a space too.
    assert list(validator.iter_errors(load_space(name).to_dict())) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"trails": 3},
        {"trials": 0},
        {"sampler": "tpee"},
        {"sampler": {"name": "tpe", "startup": 3}},
        {"pruner": {"name": "median", "reduction_factor": 3}},
        {"parameters": {"head": "linear"}},
        {"parameters": {"backbone": "ffn", "optimiser": "adam"}},
        {"parameters": {"backbone": "ffn", "optimizer": ["adamm"]}},
        {"parameters": {"backbone": "ffn", "lr": {"low": 0.1}}},
        {"parameters": {"backbone": "ffn", "lr": {"low": 0.1, "high": 1, "when": {"x": 1}}}},
        {"parameters": {"backbone": "ffn", "batch_size": {"low": 0.5, "high": 2}}},
        {"parameters": {"backbone": "ffn", "head": []}},
        {"parameters": {"backbone": "ffn", "loss": {"low": 1, "high": 2}}},
        {"points": [{"lr": "fast"}]},
        {"probe": {"parameters": {"backbone": "ffn"}}},
    ],
    ids=json.dumps,
)
def test_schema_refuses_mistakes(wrong: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    right: dict[str, Any] = {"parameters": {"backbone": "ffn"}}
    assert validator.is_valid(right)
    assert not validator.is_valid(right | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"trials": 3},
        {"mode": "probe"},
        {"probe": {"parameters": {"backbone": "ffn"}, "from_probes": 3}},
        {"finetune": {"parameters": {"backbone": "ffn"}, "from_probes": -1}},
        {"finetune": {"parameters": {"backbone": "ffn"}, "mode": "finetune"}},
        {"finetune": {"parameters": {"head": "linear"}}},
        {"parameters": {"backbone": "ffn"}},
    ],
    ids=json.dumps,
)
def test_schema_refuses_mistakes_in_two_parts(wrong: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    part: dict[str, Any] = {"parameters": {"backbone": "ffn"}}
    right = {"name": "x", "probe": part, "finetune": {"from_probes": 2, **part}}
    assert validator.is_valid(right)
    assert not validator.is_valid(right | wrong)


def test_schema_describes_every_parameter() -> None:
    properties = json_schema()["$defs"]["parameters"]["properties"]
    assert set(properties) == set(TrialConfig(backbone="ffn").to_dict()) - {"mode"}
    assert all(value["description"] for value in properties.values())


def test_words_agree_with_core() -> None:
    assert get_args(SpaceSection.model_fields["mode"].annotation) == MODES
    for model in (SpaceSection, TwoPartSection):
        assert set(get_args(model.model_fields["objective"].annotation)) <= set(METRICS)
    assert set(PARTS_OF_A_SPACE) == set(MODES) <= set(TwoPartSection.model_fields)
