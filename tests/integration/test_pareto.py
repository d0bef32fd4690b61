"""A study of two objectives under constraints, as a person runs it: searched, listed, chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from core.models.model import load_model
from core.synth import draw_posters
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.study import open_study, trial_records

from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TRIALS = 16
SPACE = f"""
name: small
trials: {NUM_TRIALS}
cohort_size: 8
objectives: [top3_accuracy, latency_ms]
constraints: {{size_mb: 8, min_class_recall: 0.01}}
pruner: {{name: successive_halving, min_epochs: 4, reduction_factor: 2}}
sampler: {{name: tpe, startup_trials: 6}}
parameters:
  backbone: [ffn, resnet18]
  image_size:
    - {{when: {{backbone: ffn}}, choice: [16, 64]}}
    - {{constant: 32}}
  head: [linear, mlp]
  hidden_sizes: {{when: {{head: mlp}}, choice: [[16], [256]]}}
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  batch_size: 32
  epochs: 8
"""
"""The weights of resnet18, and of the widest head on the larger pixels, take more than 8 MB."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    root = tmp_path_factory.mktemp("pareto")
    draw_posters(root / "drawn", num_images=240, size=(48, 72))  # Ten of a class to judge it by.
    yield Workplace(root, SPACE)


@pytest.fixture(scope="module")
def finished(place: Workplace) -> str:
    return place.run(*place.search("one"))


def test_the_study_ends_in_a_front(place: Workplace, finished: str) -> None:
    for text in ("Pareto front", "latency_ms", "tuner resume one --pick TRIAL", "pareto.png"):
        assert text in finished
    rows = place.rows("one")
    assert len(rows) == NUM_TRIALS
    complete = [row for row in rows if row["status"] == "complete"]
    assert len(complete) >= 2
    for row in complete:
        latency = row["metrics"]["latency_ms"]
        beaten = any(
            other["value"] >= row["value"]
            and other["metrics"]["latency_ms"] <= latency
            and (other["value"], -other["metrics"]["latency_ms"]) != (row["value"], -latency)
            for other in complete
        )
        assert row["front"] != beaten
        assert row["metrics"]["size_mb"] <= 8
    written = json.loads((place.folder("one") / "pareto.json").read_text())
    assert {row["trial"] for row in written} == {row["number"] for row in rows if row["front"]}
    by_shape = {
        (row["settings"]["backbone"], row["settings"].get("image_size"), *_head(row)): row
        for row in rows
    }
    for row in rows:
        same = by_shape[row["settings"]["backbone"], row["settings"].get("image_size"), *_head(row)]
        cost = {name: same["metrics"][name] for name in ("latency_ms", "size_mb")}
        assert cost.items() <= row["metrics"].items(), "measured once a shape"


def _head(row: dict[str, dict[str, str]]) -> tuple[str, str]:
    return row["settings"]["head"], str(row["settings"].get("hidden_sizes"))


def test_what_costs_too_much_is_never_trained(place: Workplace, finished: str) -> None:
    """Neither are its features computed."""
    study = open_study(place.home, "one")
    refused = [t for t in study.optuna().trials if t.constraints.get("size_mb", -1) > 0]
    ended = OutcomeLog(place.folder("one")).read()
    assert refused, "some would by chance"
    for trial in refused:
        outcome = ended[trial.number].outcome
        assert (outcome.status.value, outcome.curve) == ("infeasible", ())
        assert "MB, and size_mb is 8" in outcome.reason
        assert trial.state.name == "PRUNED"
    assert "features of ffn" in finished and "features of resnet18" not in finished


def test_mlflow_shows_front_costs_and_picture(place: Workplace, finished: str) -> None:
    parent, children = place.runs("one")
    front = {row["trial"] for row in json.loads((place.folder("one") / "pareto.json").read_text())}
    tagged = {
        int(child.data.tags["tuner.trial"])
        for child in children
        if "tuner.pareto_front" in child.data.tags
    }
    assert tagged == front
    assert all(child.data.metrics["latency_ms"] > 0 for child in children)
    client = MlflowClient(place.home.tracking_uri)
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"pareto.png", "pareto.json"} <= names
    assert parent.data.params["objective"] == "top3_accuracy, latency_ms"
    assert parent.data.params["constraint_size_mb"] == "8.0"


def test_another_trial_is_picked(place: Workplace, finished: str) -> None:
    """It is trained again, scored and registered; no trial is added."""
    study = open_study(place.home, "one")
    rows = list(trial_records(study.optuna(), study.space()))
    before = json.loads((place.folder("one") / "winner.json").read_text())["number"]
    other = next(t.number for t in rows if t.status == "complete" and t.number != before)
    num_versions = len(place.versions())
    output = place.run("resume", "one", "--pick", str(other))
    assert f"trial                   {other}: " in output
    client = MlflowClient(place.home.tracking_uri)
    version = client.get_model_version_by_alias("drawn", "challenger")
    assert version.tags["tuner.winner"] == str(other)
    assert len(place.versions()) == num_versions + 1
    winner = json.loads((place.folder("one") / "winner.json").read_text())
    assert [f["number"] for f in winner["finalists"]] == [other]
    assert load_model(Path(winner["folder"])).metadata["trial"] == other
    _, children = place.runs("one")
    marked = [c.data.tags["tuner.trial"] for c in children if "tuner.winner" in c.data.tags]
    assert marked == [str(other)]
    assert len(open_study(place.home, "one").optuna().trials) == NUM_TRIALS
