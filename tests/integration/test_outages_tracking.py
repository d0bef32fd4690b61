"""A real search whose MLflow is killed, whose artifacts' disk fills up, or are kept in S3."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from core.synth import draw_posters
from tuner.studies.outcomes import OutcomeLog

from ..disks import small_disk
from ..processes import output_of, wait_for
from ..s3_server import s3_server
from ..servers import MlflowServer
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TRIALS = 24
AWAY_SECONDS = 30
SPACE = f"""
name: small
trials: {NUM_TRIALS}
cohort_size: 4
pruner: none
sampler: random
parameters:
  backbone: ffn
  image_size: 16
  head: linear
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  batch_size: 16
  epochs: EPOCHS
"""
# With less patience at the end of a study than a person gets.
IMPATIENT = """
import tuner.tracking.tracker
tuner.tracking.tracker.END_SECONDS = {seconds}
"""


def place_of(root: Path, data: Path, *, epochs: int = 3) -> Workplace:
    flags = ("--finalists", "1", "--seeds", "1")
    return Workplace(root, SPACE.replace("EPOCHS", str(epochs)), data=data, flags=flags)


def check_delivered(place: Workplace, uri: str, num_trials: int = NUM_TRIALS) -> Any:
    """Everything is in MLflow, and once: returns the registered version."""
    place.check_whole("s", num_trials)
    parent, children = place.runs("s")
    client = MlflowClient(uri)
    everything = client.search_runs([parent.info.experiment_id], max_results=1000)
    assert len(everything) == num_trials + 1
    ended = OutcomeLog(place.folder("s")).read()
    for child in children:
        points = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
        points.sort(key=lambda point: point.step)
        curve = ended[int(child.data.tags["tuner.trial"])].outcome.curve
        expected = [metrics["validation_top3_accuracy"] for metrics in curve]
        assert [point.value for point in points] == pytest.approx(expected)
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"study.json", "split.json", "winner.json"} <= files
    assert len(client.get_metric_history(parent.info.run_id, "test_top3_accuracy")) == 1
    (version,) = client.search_model_versions("name = 'drawn'")
    (logged,) = client.search_logged_models([parent.info.experiment_id])
    assert logged.status == "READY"
    return version


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drawn"
    draw_posters(folder, num_images=120, size=(48, 72))
    return folder


@pytest.fixture
def place(tmp_path: Path, data: Path) -> Workplace:
    """Its MLflow is a file in its home."""
    return place_of(tmp_path, data)


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_mlflow_is_killed_for_30_s_in_mid_study(
    tmp_path: Path, data: Path, mlflow: MlflowServer
) -> None:
    place = place_of(tmp_path, data, epochs=150)
    place.tracking_uri = mlflow.address
    arguments = place.search("s", "--tracking-uri", mlflow.address)
    # The end of a study may come while the server is away: it is waited for, then.
    with place.start(*arguments, before=IMPATIENT.format(seconds=240)) as process:
        wait_for(lambda: place.num_ended("s") >= 4, process)
        mlflow.kill()
        before = place.num_ended("s")
        assert before < NUM_TRIALS, "the study was over before"
        time.sleep(AWAY_SECONDS)
        wait_for(lambda: place.num_ended("s") > before, process)  # It goes on meanwhile.
        mlflow.start()
        output = output_of(process)
    assert "MLflow away since" in output and "(Connection refused)" in output
    assert "MLflow is back" in output
    assert check_delivered(place, mlflow.address).version in (1, "1")


def test_an_mlflow_that_does_not_come_back_is_written_by_resume(
    tmp_path: Path, data: Path, mlflow: MlflowServer
) -> None:
    place = place_of(tmp_path, data, epochs=10)
    place.tracking_uri = mlflow.address
    arguments = place.search("s", "--tracking-uri", mlflow.address)
    with place.start(*arguments, before=IMPATIENT.format(seconds=6)) as process:
        wait_for(lambda: place.num_ended("s") >= 4, process)
        mlflow.kill()
        output = output_of(process, code=2)
    assert "MLflow could not be written for 6 s (Connection refused)" in output
    assert "tuner resume s writes them" in output and "Traceback" not in output
    ended = (place.folder("s") / "outcomes.jsonl").read_text()
    assert ended.count("\n") == NUM_TRIALS
    assert "no MLflow server answers" in place.run("resume", "s", code=2)
    mlflow.start()
    place.run("resume", "s")
    version = check_delivered(place, mlflow.address)
    place.run("resume", "s")  # There is nothing left to do, and nothing is done twice.
    assert check_delivered(place, mlflow.address).version == version.version
    assert (place.folder("s") / "outcomes.jsonl").read_text() == ended


def test_an_error_after_the_trials_leaves_no_run_running(place: Workplace) -> None:
    broken = """
import tuner.search
def break_down(*_, **__):
    raise RuntimeError("broken on purpose")
tuner.search.crown_and_register = break_down
"""
    output = place.run(*place.search("s", "--trials", "4"), code=1, before=broken)
    assert "broken on purpose" in output
    parent, children = place.runs("s")
    states = {run.data.tags["tuner.trial"]: run.info.status for run in [parent, *children]}
    assert states == {"study": "FAILED", **{str(n): "FINISHED" for n in range(4)}}
    place.run("resume", "s")
    check_delivered(place, place.tracking_uri, 4)


def test_models_are_kept_in_s3_and_predict_from_there(place: Workplace, tmp_path: Path) -> None:
    with s3_server(tmp_path) as s3:
        s3.make_bucket("models")
        arguments = place.search("s", "--trials", "4", "--artifacts", "s3://models/kept")
        place.run(*arguments, **s3.environment)
        keys = s3.keys("models")
        assert any(key.startswith("kept/drawn/") and key.endswith("MLmodel") for key in keys)
        assert not list(place.home.root.rglob("MLmodel"))
        picture = next((place.data / "Images").glob("*.jpg"))
        output = place.run(
            "predict", "models:/drawn@challenger", str(picture), "--json", **s3.environment
        )
        (answer,) = json.loads(output)
        assert len(answer["probabilities"]) == 25
        # Without the keys it says what is missing, and the study remembers where its models are.
        nobody = {**s3.environment, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
        nobody |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
        output = place.run("predict", "models:/drawn@challenger", str(picture), code=2, **nobody)
        assert "the bucket cannot be used" in output
        place.run("resume", "s", "--trials", "6", **s3.environment)
        assert len([key for key in s3.keys("models") if key.endswith("winner.json")]) == 1


def test_a_full_disk_of_artifacts_is_said_and_mended(place: Workplace, tmp_path: Path) -> None:
    """The study's own small files fit on it, the model does not."""
    folder = tmp_path / "artifacts"
    with small_disk(folder, num_bytes=64 * 2**10):
        arguments = place.search("s", "--trials", "4", "--artifacts", str(folder))
        output = place.run(*arguments, before=IMPATIENT.format(seconds=6), code=2)
        assert "(No space left on device)" in output and "tuner resume s" in output
        assert "Traceback" not in output
        assert place.versions() == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        place.run("resume", "s")
        check_delivered(place, place.tracking_uri, 4)
