"""What models cost: measured on real small models, once a study, by their shape alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from core.config import TrialConfig
from core.encoding.encoders import build_encoder
from core.heads import build_head
from core.models.model import save_model
from tuner.goals import costs
from tuner.goals.costs import COSTS, Shape, measure, measured_costs, read_costs, shape_of, shapes_of
from tuner.spaces.file import parse_space
from tuner.trials.cluster import Workers
from tuner.trials.context import Context

from ..contexts import drawn_table, small_context

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("costs")
    return small_context(drawn_table(folder, 120, (60, 90)), folder)


SMALL = TrialConfig(backbone="squeezenet1_1", image_size=64)
LARGE = dataclasses.replace(SMALL, image_size=192)
DEEP = dataclasses.replace(SMALL, head="mlp", hidden_sizes=(512,), pooling="avg_max", blocks=2)
SPATIAL = dataclasses.replace(SMALL, head="csra")


def test_size_is_that_of_the_saved_model_and_latency_grows_with_the_picture(
    context: Context, tmp_path: Path
) -> None:
    found = measure(context, [shape_of(config) for config in (SMALL, LARGE, DEEP, SPATIAL)])
    assert isinstance(found, list)
    small, large, deep, spatial = found
    assert all(set(own) == set(COSTS) and min(own.values()) > 0 for own in found)
    # Nine times the pixels; a disturbance would have to last for most of the runs.
    assert large["latency_ms"] > 1.5 * small["latency_ms"]
    assert small["size_mb"] == large["size_mb"] == spatial["size_mb"] < deep["size_mb"]
    for config, own in ((SMALL, small), (DEEP, deep)):
        assert own["size_mb"] == pytest.approx(_saved_megabytes(context, config, tmp_path), abs=0.1)


def _saved_megabytes(context: Context, config: TrialConfig, folder: Path) -> float:
    import torch

    from core.encoding.pooling import num_pooled_features

    encoder = build_encoder(config.backbone, weights="none", input_size=config.image_size)
    pools = {"pooling": config.pooling, "blocks": config.blocks}
    num_features = num_pooled_features(encoder, **pools)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"kind": config.head, "hidden_sizes": config.hidden_sizes}
    head = build_head(
        num_features=num_features, num_classes=context.table.num_classes, seed=1, **settings
    )
    model = folder / f"{config.head}-{config.blocks}"
    save_model(
        model,
        encoder=encoder,
        head=head,
        head_spec=settings,
        class_names=context.table.class_names,
        feature_mean_D=torch.zeros(num_features),
        feature_std_D=torch.ones(num_features),
        input_size=64,
        **pools,  # type: ignore[arg-type]
    )
    return sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) / 1e6


def test_a_shape_is_what_decides_the_cost() -> None:
    same = dataclasses.replace(SMALL, lr=0.5, seed=9, loss="focal", epochs=3, mode="finetune")
    assert shape_of(same) == shape_of(SMALL)
    for other in (LARGE, DEEP, SPATIAL, dataclasses.replace(SMALL, backbone="ffn")):
        assert shape_of(other) != shape_of(SMALL)
    pooled = dataclasses.replace(SPATIAL, pooling="max", blocks=2)
    assert shape_of(pooled) == shape_of(SPATIAL), "a spatial head reads neither"


def test_every_trial_of_a_space_has_one_of_its_shapes() -> None:
    space = parse_space(
        {
            "name": "x",
            "parameters": {
                "backbone": ["squeezenet1_1", "ffn"],
                "image_size": [{"when": {"backbone": "squeezenet1_1"}, "choice": [64, 96]}],
                "head": ["linear", "mlp", "csra"],
                "hidden_sizes": {"when": {"head": "mlp"}, "choice": [[16], [32, 16]]},
                "lr": {"low": 1e-4, "high": 1e-2, "log": True},
            },
        }
    )
    shapes = shapes_of(space)
    assert len(shapes) == 3 * 4
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = {
        shape_of(TrialConfig.from_dict(space.suggest(study.ask()) | {"seed": 0}))
        for _ in range(200)
    }
    assert drawn == set(shapes)


class _Console:
    """Says nothing."""

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        yield


class _Ray:
    """Runs tasks here and counts what they are asked."""

    def __init__(self) -> None:
        self.asked: list[list[Shape]] = []

    def remote(self, **resources: float) -> Any:
        def decorate(function: Any) -> Any:
            def call(context: Context, shapes: list[Shape]) -> Any:
                self.asked.append(shapes)
                return function(context, shapes)

            task = type("Task", (), {"remote": staticmethod(call)})
            return task

        return decorate

    def get(self, found: Any) -> Any:
        return found


def test_each_shape_is_measured_once_a_study(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    ray = _Ray()
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    numbers = iter(range(1, 100))
    monkeypatch.setattr(
        costs,
        "measure",
        lambda context, shapes: [
            {"latency_ms": float(next(numbers)), "size_mb": 1.0} for _ in shapes
        ],
    )
    study = optuna.create_study()
    small, large, deep = (shape_of(config) for config in (SMALL, LARGE, DEEP))
    workers = Workers(count=1, cpus=1, gpus=0)
    console: Any = _Console()
    first = measured_costs(study, [small, large], context, workers, console)
    assert [own["latency_ms"] for own in first.values()] == [1, 2]
    again = measured_costs(study, [large, deep], context, workers, console)
    assert again == {large: first[large], deep: {"latency_ms": 3.0, "size_mb": 1.0}}
    assert ray.asked == [[small, large], [deep]]
    assert read_costs(study).keys() == {small, large, deep}
    assert measured_costs(study, [small], context, workers, console) == {small: first[small]}
    assert len(ray.asked) == 2
