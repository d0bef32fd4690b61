"""A real search whose MLflow is killed, whose artifacts' disk fills up, or are kept in S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from core.synth import draw_posters
from tests.s3_server import s3_server
from tests.servers import free_port
from tuner.studies.outcomes import OutcomeLog

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_TRIALS = 24
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
# With less patience at the end than a person gets; BEFORE is what else a test changes.
RUN = """
import sys
import tuner.tracking.tracker
tuner.tracking.tracker.END_SECONDS = 6
{before}
from tuner.cli.main import main
main()
"""


class Mlflow:
    """An MLflow server on sqlite that is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [
            sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
            "--port", str(self.port), "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", str(self._folder / "served"),
        ]  # fmt: skip
        with (self._folder / "mlflow.log").open("a") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        give_up = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < give_up
            time.sleep(0.3)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return True
        except OSError:
            return False


class Place:
    """A home, pictures and a space; runs `tuner` there as a process of its own."""

    def __init__(self, root: Path, data: Path) -> None:
        self.home = root / "home"
        self.data = data
        self._root = root

    def start(self, *arguments: str, before: str = "", **variables: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "TUNER_HOME": str(self.home), **variables}
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            environment.pop(name, None)
        return subprocess.Popen(
            [sys.executable, "-c", RUN.format(before=before), *arguments],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0, before: str = "", **variables: str) -> str:
        with self.start(*arguments, before=before, **variables) as process:
            output, _ = process.communicate(timeout=500)
        assert process.returncode == code, output
        return output

    def search(self, *arguments: str, epochs: int = 3, trials: int = NUM_TRIALS) -> list[str]:
        space = self._root / "small.yaml"
        space.write_text(SPACE.replace("EPOCHS", str(epochs)))
        return [
            "search", str(space), "--data", str(self.data), "--weights", "none", "--study", "s",
            "--trials", str(trials), "--finalists", "1", "--seeds", "1", *arguments,
        ]  # fmt: skip

    def wait_for_ends(self, count: int, process: subprocess.Popen[str]) -> int:
        """Until so many trials have ended; how many have."""
        log = self.home / "studies/s/outcomes.jsonl"
        give_up = time.monotonic() + 400
        while True:
            ended = log.read_text().count("\n") if log.exists() else 0
            if ended >= count:
                return ended
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.05)

    def assert_whole(self, uri: str, trials: int = NUM_TRIALS) -> Any:
        """Everything is in MLflow, and once: returns the registered version."""
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("drawn")
        assert experiment is not None
        runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
        (parent,) = [run for run in runs if run.data.tags["tuner.trial"] == "study"]
        children = {int(r.data.tags["tuner.trial"]): r for r in runs if r is not parent}
        assert sorted(children) == list(range(trials)) and len(runs) == trials + 1
        assert {run.info.status for run in runs} == {"FINISHED"}
        ended = OutcomeLog(self.home / "studies/s").read()
        assert sorted(ended) == list(range(trials))
        for number, child in children.items():
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
            points = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
            points.sort(key=lambda point: point.step)
            curve = [metrics["validation_top3_accuracy"] for metrics in ended[number].outcome.curve]
            assert [point.value for point in points] == pytest.approx(curve)
        files = {file.path for file in client.list_artifacts(parent.info.run_id)}
        assert {"study.json", "split.json", "winner.json"} <= files
        assert len(client.get_metric_history(parent.info.run_id, "test_top3_accuracy")) == 1
        (version,) = client.search_model_versions("name = 'drawn'")
        (logged,) = client.search_logged_models([experiment.experiment_id])
        assert logged.status == "READY"
        return version


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drawn"
    draw_posters(folder, num_images=120, size=(48, 72))
    return folder


@pytest.fixture
def place(tmp_path: Path, data: Path) -> Place:
    return Place(tmp_path, data)


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[Mlflow]:
    server = Mlflow(tmp_path)
    server.start()
    yield server
    server.kill()


def test_mlflow_is_killed_for_30_s_in_mid_study(place: Place, mlflow: Mlflow) -> None:
    arguments = place.search("--tracking-uri", mlflow.address, epochs=150)
    # The end of a study may come while the server is away: it is waited for, then.
    with place.start(*arguments, before="tuner.tracking.tracker.END_SECONDS = 120") as process:
        before = place.wait_for_ends(4, process)
        mlflow.kill()
        time.sleep(30)
        assert place.wait_for_ends(before + 1, process) > before, "the study goes on meanwhile"
        mlflow.start()
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "MLflow away since" in output and "(Connection refused)" in output
    assert "MLflow is back" in output
    assert place.assert_whole(mlflow.address).version in (1, "1")


def test_an_mlflow_that_does_not_come_back_is_written_by_resume(
    place: Place, mlflow: Mlflow
) -> None:
    arguments = place.search("--tracking-uri", mlflow.address, epochs=10)
    with place.start(*arguments) as process:
        place.wait_for_ends(4, process)
        mlflow.kill()
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 2, output
    assert "MLflow could not be written for 6 s (Connection refused)" in output
    assert "tuner resume s writes them" in output and "Traceback" not in output
    ended = (place.home / "studies/s/outcomes.jsonl").read_text()
    assert ended.count("\n") == NUM_TRIALS
    assert "no MLflow server answers" in place.run("resume", "s", code=2)
    mlflow.start()
    place.run("resume", "s")
    version = place.assert_whole(mlflow.address)
    place.run("resume", "s")  # There is nothing left to do, and nothing is done twice.
    assert place.assert_whole(mlflow.address).version == version.version
    assert (place.home / "studies/s/outcomes.jsonl").read_text() == ended


def test_an_error_after_the_trials_leaves_no_run_running(place: Place) -> None:
    broken = """
import tuner.search
def break_down(*_, **__):
    raise RuntimeError("broken on purpose")
tuner.search.crown_and_register = break_down
"""
    output = place.run(*place.search(trials=4), code=1, before=broken)
    assert "broken on purpose" in output
    uri = f"sqlite:///{place.home}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("drawn")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    states = {run.data.tags["tuner.trial"]: run.info.status for run in runs}
    assert states == {"study": "FAILED", **{str(n): "FINISHED" for n in range(4)}}
    place.run("resume", "s")
    place.assert_whole(uri, trials=4)


def test_models_are_kept_in_s3_and_predict_from_there(place: Place, tmp_path: Path) -> None:
    with s3_server(tmp_path) as s3:
        s3.make_bucket("models")
        place.run(*place.search("--artifacts", "s3://models/kept", trials=4), **s3.environment)
        keys = s3.keys("models")
        assert any(key.startswith("kept/drawn/") and key.endswith("MLmodel") for key in keys)
        assert not list(place.home.rglob("MLmodel"))
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


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_of_artifacts_is_said_and_mended(place: Place, tmp_path: Path) -> None:
    """The study's own small files fit on it, the model does not."""
    folder = tmp_path / "artifacts"
    with small_disk(folder, "64k"):
        output = place.run(*place.search("--artifacts", str(folder), trials=4), code=2)
        assert "(No space left on device)" in output and "tuner resume s" in output
        assert "Traceback" not in output
        uri = f"sqlite:///{place.home}/mlflow.db"
        assert MlflowClient(uri).search_model_versions("name = 'drawn'") == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        place.run("resume", "s")
        place.assert_whole(uri, trials=4)
