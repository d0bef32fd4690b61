"""The main job as a person runs it: the real command, a real Ray, a real MLflow, drawn posters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient

from core.synth import draw_posters
from tuner.home import Home
from tuner.studies.study import open_study

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


class Workplace:
    """A home folder, drawn posters and a space; runs `tuner` there as a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = Home(root=root / "home")
        self.data = root / "drawn"
        self.space = root / "small.yaml"
        self.space.write_text(SPACE)
        draw_posters(self.data, num_images=150, size=(60, 90))

    def start(self, *arguments: str, pace: str | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "TUNER_HOME": str(self.home.root)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        return subprocess.Popen(
            [sys.executable, "-m", "tuner", *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> str:
        """Run to the end; fails with the output unless the exit code is 0."""
        with self.start(*arguments) as process:
            output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def search(self, study: str, *arguments: str) -> list[str]:
        space, data = str(self.space), str(self.data)
        return ["search", space, "--data", data, "--weights", "none", "--study", study, *arguments]

    def trials(self, study: str) -> dict[int, dict[str, Any]]:
        lines = self.run("trials", study, "--json").splitlines()
        return {trial["number"]: trial for trial in map(json.loads, lines)}

    def runs(self, study: str) -> tuple[Any, list[Any]]:
        """The study's parent run and its child runs in MLflow."""
        client = MlflowClient(self.home.tracking_uri)
        experiment = client.get_experiment_by_name("drawn")
        assert experiment is not None
        runs = list(
            client.search_runs(
                [experiment.experiment_id], f"tags.`tuner.study` = '{study}'", max_results=1000
            )
        )
        parents = [run for run in runs if run.data.tags["tuner.trial"] == "study"]
        assert len(parents) == 1
        children = [run for run in runs if run is not parents[0]]
        for child in children:
            assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        return parents[0], children

    def optuna_states(self, study: str) -> list[str]:
        states = open_study(self.home, study).optuna().get_trials(deepcopy=False)
        return [trial.state.name for trial in states]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        yield Workplace(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def finished(place: Workplace) -> str:
    """The output of a first study, `one`."""
    return place.run(*place.search("one"))


def _assert_whole(place: Workplace, study: str, num_trials: int) -> None:
    """One to one to one: Optuna trials, MLflow runs, and none of them running."""
    states = place.optuna_states(study)
    assert len(states) == num_trials
    assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}
    parent, children = place.runs(study)
    assert parent.info.status == "FINISHED"
    numbers = sorted(int(child.data.tags["tuner.trial"]) for child in children)
    assert numbers == list(range(num_trials))
    expected = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED"}
    for child in children:
        number = int(child.data.tags["tuner.trial"])
        assert child.info.status == expected[states[number]], number


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
    _assert_whole(place, "one", NUM_TRIALS)


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


def test_the_winner_is_registered_and_predicts(place: Workplace, finished: str) -> None:
    client = MlflowClient(place.home.tracking_uri)
    version = client.get_model_version_by_alias("drawn", "challenger")
    assert version.tags["tuner.study"] == "one"
    pictures = sorted((place.data / "Images").glob("*.jpg"))[:2]
    output = place.run("predict", "models:/drawn@challenger", *map(str, pictures), "--json")
    answers = json.loads(output)
    assert [answer["image"] for answer in answers] == [str(p) for p in pictures]
    mlflow.set_tracking_uri(place.home.tracking_uri)
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
    assert scores["top3_accuracy"] == pytest.approx(expected, abs=0.03)
    assert scores["prior_baseline"] == parent.data.metrics["test_prior_baseline"]


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


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupted_study_is_taken_up(
    place: Workplace, finished: str, how: signal.Signals
) -> None:
    """Ended after the first trials have: nothing is lost, run twice or left running."""
    study = f"stopped-{how.name}"
    log = place.home.studies / study / "outcomes.jsonl"
    # More and longer trials than can be over when the signal comes.
    many = ["--trials", "60"]
    with place.start(*place.search(study, *many)) as process:
        give_up = time.monotonic() + 200
        while not (log.exists() and log.read_text().count("\n") >= 4):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.05)
        process.send_signal(how)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), output
    if how == signal.SIGINT:
        assert f"tuner resume {study}" in output
        _, children = place.runs(study)
        assert "RUNNING" not in {child.info.status for child in children}
    ended = [json.loads(line) for line in log.read_text().splitlines()]
    before = {trial["number"]: trial["outcome"]["best_value"] for trial in ended}
    assert 4 <= len(before) < 60
    place.run("resume", study)
    _assert_whole(place, study, 60)
    after = place.trials(study)
    assert {number: after[number]["value"] for number in before} == before
    lines = [json.loads(line)["number"] for line in log.read_text().splitlines()]
    assert sorted(lines) == list(range(60))


@pytest.mark.slow
def test_trials_are_added_to_a_finished_study(place: Workplace, finished: str) -> None:
    place.run(*place.search("grown", "--trials", "6"))
    place.run("resume", "grown", "--trials", "9")
    _assert_whole(place, "grown", 9)


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
    space = place.root / "fine.yaml"
    space.write_text(FINETUNE_SPACE)
    few = ("--finalists", "2", "--seeds", "2")
    arguments = place.search("fine", "--model", "fine", *few)
    place.run("search", str(space), *arguments[2:])
    trials = place.trials("fine")
    assert len(trials) == 5
    complete = {n: t["value"] for n, t in trials.items() if t["status"] == "complete"}
    assert all(trials[n]["epochs"] == 3 for n in complete)
    assert all(t["epochs"] in (1, 2) for t in trials.values() if t["status"] == "pruned")
    states = {int(path.stem) for path in (place.home.studies / "fine/states").iterdir()}
    assert states <= complete.keys() and 1 <= len(states) <= 3
    winner = json.loads((place.home.studies / "fine/winner.json").read_text())
    finalists = winner["finalists"]
    best_two = sorted(complete, key=lambda n: -complete[n])[:2]
    assert {f["number"] for f in finalists} == set(best_two)
    assert winner["number"] == max(finalists, key=lambda f: f["mean"])["number"]
    assert all(len(f["values"]) == 2 for f in finalists)
    picture = next((place.data / "Images").glob("*.jpg"))
    (answer,) = json.loads(place.run("predict", "models:/fine@challenger", str(picture), "--json"))
    assert len(answer["probabilities"]) == 25
