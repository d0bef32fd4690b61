"""Where a person works: a home, pictures and a space. Runs the real `tuner` there, and reads what
that left behind: Optuna's trials, MLflow's runs, its own log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from core.synth import draw_posters
from tuner.home import Home
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.study import open_study

from ..processes import ended_with_the_block, output_of

FEW = ("--finalists", "2", "--seeds", "2")

# A shell's background jobs ignore Ctrl-C, and these tests may be in one.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
from tuner.cli.main import main
main()
"""


class Workplace:
    """A home folder, drawn posters and a space; runs `tuner` there."""

    def __init__(
        self,
        root: Path,
        space: str,
        *,
        home: Path | None = None,
        data: Path | None = None,
        tracking_uri: str | None = None,
        flags: tuple[str, ...] = FEW,
    ) -> None:
        """`data`: a folder called `drawn`, whose pictures are drawn if there are none.
        `tracking_uri`: None for the home's own. `flags`: of every search."""
        self.home = Home(root=home or root / "home")
        self.data = data or root / "drawn"
        self.space = root / "space.yaml"
        self.space.write_text(space)
        self.tracking_uri = tracking_uri or self.home.tracking_uri
        self._flags = (*flags, "--tracking-uri", tracking_uri) if tracking_uri else flags
        if not self.data.exists():
            draw_posters(self.data, num_images=120, size=(48, 72))

    def start(
        self, *arguments: str, before: str = "", **variables: str
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        """`tuner ARGUMENTS`, killed at the end of the block if it is still there. `before`: code
        that its process runs first."""
        environment = {**os.environ, "TUNER_HOME": str(self.home.root), "COLUMNS": "160"}
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            environment.pop(name, None)
        process = subprocess.Popen(
            [sys.executable, "-c", RUN.format(before=before), *arguments],
            env=environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return ended_with_the_block(process)

    def run(self, *arguments: str, code: int = 0, before: str = "", **variables: str) -> str:
        """What `tuner ARGUMENTS` prints; fails with it if the exit code is another."""
        with self.start(*arguments, before=before, **variables) as process:
            return output_of(process, code=code)

    def search(self, study: str, *arguments: str) -> list[str]:
        return [
            "search", str(self.space), "--data", str(self.data), "--weights", "none",
            "--study", study, *self._flags, *arguments,
        ]  # fmt: skip

    # ---- what a study left behind ---------------------------------------------------------

    def folder(self, study: str) -> Path:
        return self.home.studies / study

    def num_ended(self, study: str) -> int:
        """How many trials this home has run to their end, even while they run."""
        log = self.folder(study) / "outcomes.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def logged(self, study: str) -> list[int]:
        """Numbers of the trials that this home has run to their end, in order; twice if twice."""
        log = self.folder(study) / "outcomes.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return sorted(json.loads(line)["number"] for line in lines if _is_whole(line))

    def rows(self, study: str) -> list[dict[str, Any]]:
        """What `tuner trials --json` prints: for a study of two parts, the trials of both."""
        return [json.loads(line) for line in self.run("trials", study, "--json").splitlines()]

    def trials(self, study: str) -> dict[int, dict[str, Any]]:
        """The same by number, for a study of one part."""
        rows = self.rows(study)
        found = {row["number"]: row for row in rows}
        assert len(found) == len(rows), "a number comes twice"
        return found

    def values(self, study: str) -> dict[int, tuple[Any, ...]]:
        """By trial: its state, value, and all that was set, as Optuna keeps them."""
        trials = open_study(self.home, study).optuna().get_trials(deepcopy=False)
        return {t.number: (t.state.name, t.value, dict(t.params)) for t in trials}

    def runs(self, study: str) -> tuple[Any, list[Any]]:
        """The study's parent run and its child runs in MLflow."""
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name("drawn")
        assert experiment is not None
        query = f"tags.`tuner.study` = '{study}'"
        runs = list(client.search_runs([experiment.experiment_id], query, max_results=1000))
        (parent,) = [run for run in runs if run.data.tags["tuner.trial"] == "study"]
        children = [run for run in runs if run is not parent]
        for child in children:
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        return parent, children

    def versions(self) -> list[Any]:
        """Of the registered model."""
        client = MlflowClient(self.tracking_uri)
        return list(client.search_model_versions("name = 'drawn'"))

    def check_whole(self, study: str, num_trials: int) -> None:
        """Every trial once in Optuna, in MLflow and in the log, with one curve; none running."""
        states = {number: state for number, (state, *_) in self.values(study).items()}
        assert sorted(states) == list(range(num_trials))
        assert set(states.values()) <= {"COMPLETE", "PRUNED"}
        ended = OutcomeLog(self.folder(study)).read()
        assert sorted(ended) == list(range(num_trials))
        assert self.logged(study) == list(range(num_trials)), "a trial ran twice to its end"
        curves = {number: trial.outcome.curve for number, trial in ended.items()}
        self.check_runs(study, {number: len(curve) for number, curve in curves.items()})

    def check_runs(self, study: str, num_epochs: dict[int, int]) -> None:
        """In MLflow: one run a trial, ended, with one point an epoch, under one ended parent."""
        parent, children = self.runs(study)
        assert parent.info.status == "FINISHED"
        numbers = sorted(int(child.data.tags["tuner.trial"]) for child in children)
        assert numbers == sorted(num_epochs)
        assert {child.info.status for child in children} == {"FINISHED"}
        client = MlflowClient(self.tracking_uri)
        for child in children:
            history = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
            steps = sorted(point.step for point in history)
            assert steps == list(range(1, num_epochs[int(child.data.tags["tuner.trial"])] + 1))


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False  # A kill cut it off.
    return True
