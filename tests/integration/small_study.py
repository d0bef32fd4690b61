"""A small study as a process of its own, to be killed at any moment, and what must then hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from core.synth import draw_posters
from tuner.home import Home
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.study import open_study

NUM_TRIALS = 24
PROBES = f"""
name: small
trials: {NUM_TRIALS}
cohort_size: 4
pruner: {{name: successive_halving, min_epochs: 2}}
sampler: {{name: tpe, startup_trials: 6}}
parameters:
  backbone: ffn
  image_size: 16
  head: [linear, mlp]
  hidden_sizes: {{when: {{head: mlp}}, choice: [[8], [16]]}}
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  weight_decay: {{low: 1.0e-2, high: 1, log: true}}
  batch_size: 32
  epochs: 40
"""
FINETUNES = """
name: fine
mode: finetune
trials: 3
cohort_size: 1
pruner: none
sampler: random
parameters:
  backbone: squeezenet1_1
  image_size: 32
  unfrozen_stages: [1, 2]
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
  batch_size: 32
  epochs: 8
"""

# A shell's background jobs ignore Ctrl-C, and these tests may be in one.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tuner.cli.main import main
main()
"""


class Workplace:
    """A home folder, drawn posters and a space; runs `tuner` there."""

    def __init__(self, root: Path, space: str = PROBES, *, home: Path | None = None) -> None:
        self.home = Home(root=home or root / "home")
        self.data = root / "drawn"
        self.space = root / "space.yaml"
        self.space.write_text(space)
        if not self.data.exists():
            draw_posters(self.data, num_images=120, size=(48, 72))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "TUNER_HOME": str(self.home.root), "COLUMNS": "160"}
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            environment.pop(name, None)
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments],
            env=environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0, **variables: str) -> str:
        with self.start(*arguments, **variables) as process:
            output, _ = process.communicate(timeout=400)
        assert process.returncode == code, output
        return output

    def search(self, study: str, *arguments: str) -> list[str]:
        return [
            "search", str(self.space), "--data", str(self.data), "--weights", "none",
            "--study", study, "--finalists", "2", "--seeds", "2", *arguments,
        ]  # fmt: skip

    def folder(self, study: str) -> Path:
        return self.home.studies / study

    def num_ended(self, study: str) -> int:
        log = self.folder(study) / "outcomes.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def values(self, study: str) -> dict[int, tuple[Any, ...]]:
        """By trial: its state, value, and all that was set, as Optuna keeps them."""
        trials = open_study(self.home, study).optuna().get_trials(deepcopy=False)
        return {t.number: (t.state.name, t.value, dict(t.params)) for t in trials}

    def runs(self, study: str, experiment: str = "drawn") -> tuple[Any, list[Any]]:
        """The study's parent run and its child runs in MLflow."""
        client = MlflowClient(self.home.tracking_uri)
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        query = f"tags.`tuner.study` = '{study}'"
        runs = list(client.search_runs([found.experiment_id], query, max_results=1000))
        parents = [run for run in runs if run.data.tags["tuner.trial"] == "study"]
        assert len(parents) == 1
        children = [run for run in runs if run is not parents[0]]
        for child in children:
            assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        return parents[0], children

    def versions(self) -> list[Any]:
        """Of the registered model."""
        client = MlflowClient(self.home.tracking_uri)
        return list(client.search_model_versions("name = 'drawn'"))

    def check_whole(self, study: str, num_trials: int = NUM_TRIALS) -> None:
        """Every trial once in Optuna, in MLflow and in the log, with one curve; none running."""
        states = {number: state for number, (state, *_) in self.values(study).items()}
        assert sorted(states) == list(range(num_trials))
        assert set(states.values()) <= {"COMPLETE", "PRUNED"}
        parent, children = self.runs(study)
        assert parent.info.status == "FINISHED"
        numbers = sorted(int(child.data.tags["tuner.trial"]) for child in children)
        assert numbers == list(range(num_trials))
        assert {child.info.status for child in children} == {"FINISHED"}
        ended = OutcomeLog(self.folder(study)).read()
        assert sorted(ended) == list(range(num_trials))
        lines = (self.folder(study) / "outcomes.jsonl").read_text().splitlines()
        logged = [json.loads(line)["number"] for line in lines if _is_whole(line)]
        assert sorted(logged) == list(range(num_trials)), "a trial ran twice to its end"
        client = MlflowClient(self.home.tracking_uri)
        for child in children:
            history = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
            steps = sorted(point.step for point in history)
            curve = ended[int(child.data.tags["tuner.trial"])].outcome.curve
            assert steps == list(range(1, len(curve) + 1))


def wait_for(
    holds: Callable[[], object], process: subprocess.Popen[str], *, seconds: float = 240
) -> bool:
    """Wait until `holds`; False if the process ended before."""
    give_up = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None:
            return False
        assert time.monotonic() < give_up, "it did not come to that point in time"
        time.sleep(0.01)
    return True


def family(pid: int) -> dict[int, bytes]:
    """Processes that this one started, or that those started, with their command lines."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        parents[int(folder.name)] = int(fields[1])
    found = {}
    for candidate in parents:
        ancestor = candidate
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        if ancestor == pid and candidate != pid:
            found[candidate] = command(candidate)
    return found


def command(pid: int) -> bytes:
    """A process' command line; empty if it has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def left_of(processes: dict[int, bytes], *, seconds: float = 20) -> dict[int, bytes]:
    """Those of the processes that are still there after some time; none, if all is well."""
    give_up = time.monotonic() + seconds
    while True:
        left = {pid: text for pid, text in processes.items() if text and command(pid) == text}
        if not left or time.monotonic() > give_up:
            return left
        time.sleep(0.2)


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False  # A kill cut it off.
    return True
