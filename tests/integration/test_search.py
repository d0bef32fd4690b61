"""The main job as a person runs it: the real command, a real Ray, a real MLflow, drawn posters."""

from __future__ import annotations

import json
import signal
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from core.synth import draw_posters

from ..processes import output_of, wait_for
from .workplace import FEW, Workplace

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
]

NUM_TRIALS = 12
SPACE = f"""
name: small
trials: {NUM_TRIALS}
cohort_size: 6
pruner: {{name: successive_halving, min_epochs: 2}}
sampler: {{name: tpe, startup_trials: 4}}
parameters:
  backbone: [ffn, squeezenet1_1]
  image_size:
    - {{when: {{backbone: squeezenet1_1}}, constant: 64}}
  head: [linear, mlp]
  hidden_sizes: {{when: {{head: mlp}}, choice: [[16]]}}
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  weight_decay: {{low: 1.0e-2, high: 1, log: true}}
  batch_size: 32
  epochs: 8
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quiet_optuna: None) -> Workplace:
    root = tmp_path_factory.mktemp("search")
    draw_posters(root / "drawn", num_images=150, size=(60, 90))
    return Workplace(root, SPACE, flags=())


@pytest.fixture(scope="module")
def finished(place: Workplace) -> str:
    """The output of a first study, `one`."""
    return place.run(*place.search("one"))


def test_the_output_names_winner_baseline_model_and_next_steps(finished: str) -> None:
    for text in (
        "top3_accuracy on test",
        "95 % interval",
        "prior baseline",
        "models:/drawn@challenger",
        "tuner ui",
        "tuner predict models:/drawn@challenger",
        f"{NUM_TRIALS}/{NUM_TRIALS} trials",
    ):
        assert text in finished


def test_every_trial_is_one_run_under_the_study(place: Workplace, finished: str) -> None:
    place.check_whole("one", NUM_TRIALS)


def test_runs_hold_parameters_curves_and_ends(place: Workplace, finished: str) -> None:
    parent, children = place.runs("one")
    client = MlflowClient(place.home.tracking_uri)
    trials = place.trials("one")
    for child in children:
        trial = trials[int(child.data.tags["tuner.trial"])]
        assert child.data.tags["tuner.status"] == trial["status"]
        assert float(child.data.params["lr"]) == trial["settings"]["lr"]
        curve = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
        assert sorted(point.step for point in curve) == list(range(1, trial["epochs"] + 1))
        assert max(point.value for point in curve) == pytest.approx(trial["value"])
        assert child.data.metrics["device_seconds"] > 0
        if trial["status"] == "pruned":
            assert trial["epochs"] in (2, 6)
            assert child.data.tags["tuner.reason"] == f"pruned at epoch {trial['epochs']}"
        else:
            assert trial["epochs"] == 8
    assert {trial["status"] for trial in trials.values()} == {"complete", "pruned"}
    assert parent.data.metrics["test_top3_accuracy"] > 0


def test_the_winner_is_registered_and_predicts(
    place: Workplace, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(place.home.tracking_uri)
    version = client.get_model_version_by_alias("drawn", "challenger")
    assert version.tags["tuner.study"] == "one"
    pictures = sorted((place.data / "Images").glob("*.jpg"))[:2]
    output = place.run("predict", "models:/drawn@challenger", *map(str, pictures), "--json")
    answers = json.loads(output)
    assert [answer["image"] for answer in answers] == [str(p) for p in pictures]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/drawn/{version.version}")
    frame = model.predict(pd.DataFrame({"image": [p.read_bytes() for p in pictures]}))
    assert frame.shape == (2, 25)
    for answer, (_, row) in zip(answers, frame.iterrows(), strict=True):
        assert answer["probabilities"] == pytest.approx(row.to_dict(), abs=1e-5)


def test_evaluate_agrees_with_the_study(place: Workplace, finished: str) -> None:
    """From picture files, with the model as it is served."""
    parent, _ = place.runs("one")
    output = place.run("evaluate", "models:/drawn@challenger", "--data", str(place.data), "--json")
    scores = json.loads(output[output.index("{") :])
    assert scores["split"] == "test"
    expected = parent.data.metrics["test_top3_accuracy"]
    # Of its 52 labels: the study's features may be in bfloat16, served ones are in float32.
    assert scores["top3_accuracy"] == pytest.approx(expected, abs=2.5 / 52)
    assert scores["prior_baseline"] == parent.data.metrics["test_prior_baseline"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_study_and_no_feature_twice(
    place: Workplace, finished: str
) -> None:
    shards = list(place.home.cache.glob("features/*/shards/*.json"))
    matrices = list(place.home.cache.glob("features/*/matrix.npy"))
    assert len(matrices) == 2
    before = {path: path.stat().st_mtime_ns for path in [*shards, *matrices]}
    place.run(*place.search("two"))
    after = place.home.cache.glob("features/*/shards/*.json")
    matrices = list(place.home.cache.glob("features/*/matrix.npy"))
    assert {path: path.stat().st_mtime_ns for path in [*after, *matrices]} == before

    def comparable(study: str) -> dict[int, dict[str, Any]]:
        return {
            number: {key: value for key, value in trial.items() if key != "seconds"}
            for number, trial in place.trials(study).items()
        }

    assert comparable("two") == comparable("one")
    winners = [
        json.loads((place.home.studies / s / "winner.json").read_text()) for s in ("one", "two")
    ]
    assert winners[0]["evaluation"] == winners[1]["evaluation"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_study_is_taken_up(
    place: Workplace, finished: str, how: signal.Signals
) -> None:
    """Ended after the first trials have: nothing is lost, run twice or left running."""
    study = f"stopped-{how.name}"
    log = place.folder(study) / "outcomes.jsonl"
    # More and longer trials than can be over when the signal comes.
    with place.start(*place.search(study, "--trials", "60")) as process:
        wait_for(lambda: place.num_ended(study) >= 4, process)
        process.send_signal(how)
        output = output_of(process, code=130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert f"tuner resume {study}" in output
        _, children = place.runs(study)
        assert "RUNNING" not in {child.info.status for child in children}
    ended = [json.loads(line) for line in log.read_text().splitlines()]
    before = {trial["number"]: trial["outcome"]["best_value"] for trial in ended}
    assert 4 <= len(before) < 60
    place.run("resume", study)
    place.check_whole(study, 60)
    after = place.trials(study)
    assert {number: after[number]["value"] for number in before} == before


@pytest.mark.slow
def test_trials_are_added_to_a_finished_study(place: Workplace, finished: str) -> None:
    place.run(*place.search("grown", "--trials", "6"))
    place.run("resume", "grown", "--trials", "9")
    place.check_whole("grown", 9)


FINETUNE_SPACE = """
name: fine
mode: finetune
trials: 5
cohort_size: 2
pruner: {name: successive_halving, min_epochs: 1, reduction_factor: 2}
sampler: random
parameters:
  backbone: squeezenet1_1
  image_size: 64
  unfrozen_stages: [1, 2]
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
  horizontal_flip: true
  batch_size: 32
  epochs: 3
"""


@pytest.mark.slow
def test_a_fine_tuning_study_ends_in_a_model_and_keeps_few_weights(
    place: Workplace, finished: str
) -> None:
    space = place.space.with_name("fine.yaml")
    space.write_text(FINETUNE_SPACE)
    arguments = place.search("fine", "--model", "fine", *FEW)
    place.run("search", str(space), *arguments[2:])
    trials = place.trials("fine")
    assert len(trials) == 5
    complete = {n: t["value"] for n, t in trials.items() if t["status"] == "complete"}
    assert all(trials[n]["epochs"] == 3 for n in complete)
    assert all(t["epochs"] in (1, 2) for t in trials.values() if t["status"] == "pruned")
    states = {int(path.stem) for path in (place.folder("fine") / "states").iterdir()}
    assert states <= complete.keys() and 1 <= len(states) <= 3
    winner = json.loads((place.folder("fine") / "winner.json").read_text())
    finalists = winner["finalists"]
    best_two = sorted(complete, key=lambda n: -complete[n])[:2]
    assert {f["number"] for f in finalists} == set(best_two)
    assert winner["number"] == max(finalists, key=lambda f: f["mean"])["number"]
    assert all(len(f["values"]) == 2 for f in finalists)
    picture = next((place.data / "Images").glob("*.jpg"))
    (answer,) = json.loads(place.run("predict", "models:/fine@challenger", str(picture), "--json"))
    assert len(answer["probabilities"]) == 25
