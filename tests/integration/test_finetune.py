"""Fine-tuning trials on Ray Train workers: a real Ray, a real MLflow, drawn posters, an aggressive
pruner; one worker a trial and two. (`test_search.py` runs a whole fine-tuning study by command.)"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import ray
from mlflow import MlflowClient
from rich.console import Console

from core.data.split import make_split
from tuner.features.feature_work import ensure_features
from tuner.home import Home, open_home
from tuner.spaces.file import parse_space
from tuner.studies.outcomes import EndedTrial, OutcomeLog
from tuner.studies.plan import make_plan
from tuner.studies.study import StudyRecord, create_study
from tuner.tracking.tracker import Tracker
from tuner.trials.cluster import Share, Workers, cluster
from tuner.trials.context import build_backbone
from tuner.trials.on_tune import run_trials
from tuner.trials.telling import FITS
from tuner.views.live import StudyView

from ..contexts import drawn_table, small_context
from ..processes import family, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # Of Ray's, in this process as it is the driver:
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUM_TRIALS = 12
EPOCHS = 4
SPACE: dict[str, Any] = {
    "name": "fine",
    "mode": "finetune",
    "trials": NUM_TRIALS,
    "cohort_size": 2,
    "pruner": {"name": "successive_halving", "min_epochs": 1, "reduction_factor": 2},
    "sampler": "random",
    "parameters": {
        "backbone": "squeezenet1_1",
        "image_size": 32,
        "unfrozen_stages": {"low": 0, "high": 3},
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "horizontal_flip": True,
        "batch_size": 32,
        "epochs": EPOCHS,
    },
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A study whose trials have run."""

    trials: list[optuna.trial.FrozenTrial]
    outcomes: dict[int, EndedTrial]
    runs: dict[int, Any]
    """MLflow's, by trial."""
    folder: Path


class Place:
    """A home and a table on a running Ray."""

    def __init__(self, root: Path, workers: Workers) -> None:
        self.home: Home = open_home(root / "home")
        self.table = drawn_table(root, 150, (48, 72))
        self.split = make_split(self.table, seed=0)
        self.workers = workers

    def run(
        self, name: str, *, share: Share, memory_bytes: int | None = None, **changes: Any
    ) -> Ended:
        """Run the trials of a new study; SPACE with `changes` in its parameters or beside."""
        parameters = SPACE["parameters"] | changes.pop("parameters", {})
        space = parse_space(SPACE | changes | {"parameters": parameters})
        record = StudyRecord(
            name=name, space=space.to_dict(), data={}, skipped=(), fingerprint="", num_folds=None,
            seed=0, trials=space.trials, storage=None,
            tracking_uri=f"sqlite:///{self.home.root}/mlflow.db", model=name, weights="none",
            weights_dir=None,
        )  # fmt: skip
        study = create_study(self.home, record)
        study.optuna(new=True)
        plan = make_plan(space, trials=None, hours=None)
        context = small_context(
            self.table, self.home.root, study=name, split=self.split, cache=self.home.cache,
            folder=study.folder, rungs=plan.rungs, memory_bytes=memory_bytes,
        )  # fmt: skip
        features = {
            request: str(ensure_features(context, request, build_backbone(context, request)).folder)
            for request in plan.requests
        }
        tracker = Tracker(
            record.tracking_uri, experiment=name, artifacts=self.home.artifacts, study=name,
            objective=space.objective, floor=0.0,
        )  # fmt: skip
        view = StudyView(Console(file=StringIO()), space, budget=plan.trials, floor=0.0)
        try:
            tracker.start_study({})
            assert run_trials(
                study, space, context, plan, self.workers,
                features=features, tracker=tracker, view=view, share=share,
            )  # fmt: skip
        finally:
            tracker.close()
        return Ended(
            trials=study.optuna().get_trials(deepcopy=False),
            outcomes=OutcomeLog(study.folder).read(),
            runs=_runs(record.tracking_uri, name),
            folder=study.folder,
        )


def _runs(tracking_uri: str, study: str) -> dict[int, Any]:
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    trials = [run for run in found if run.data.tags["tuner.trial"] != "study"]
    runs = {int(run.data.tags["tuner.trial"]): run for run in trials}
    assert len(runs) == len(trials), "a trial has two runs"
    return runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quiet_optuna: None) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        with cluster("local") as workers:
            # As on two cores, however many there are.
            machines = tuple(dataclasses.replace(m, cpus=2.0) for m in workers.machines)
            yield Place(tmp_path_factory.mktemp("finetune"), dataclasses.replace(
                workers, cpus=2.0, gpus=0.0, machines=machines
            ))  # fmt: skip


def _assert_no_group_is_left() -> None:
    """Tune's own may take a moment to go."""

    def gone() -> bool:
        groups = ray.util.placement_group_table().values()
        return all(group["state"] == "REMOVED" for group in groups)

    wait_for(gone, seconds=60, pause=0.2)


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_trials_are_pruned_with_their_step(place: Place, num_workers: int) -> None:
    ended = place.run(f"workers-{num_workers}", share=Share(workers=num_workers))
    states = [trial.state.name for trial in ended.trials]
    assert len(states) == NUM_TRIALS and set(states) == {"COMPLETE", "PRUNED"}
    assert states.count("PRUNED") >= NUM_TRIALS // 3
    assert ended.runs.keys() == set(range(NUM_TRIALS))
    for trial in ended.trials:
        outcome, run = ended.outcomes[trial.number].outcome, ended.runs[trial.number]
        assert run.info.status == "FINISHED"
        assert run.data.tags["tuner.status"] == trial.state.name.lower() == outcome.status
        if trial.state.name == "PRUNED":
            step = trial.last_step
            assert step in (1, 2) and len(outcome.curve) == step
            assert run.data.tags["tuner.reason"] == f"pruned at epoch {step}"
        else:
            assert len(outcome.curve) == EPOCHS
    assert not list((ended.folder / "checkpoints").glob("*"))
    states_kept = [int(path.stem) for path in (ended.folder / "states").iterdir()]
    complete = {t.number: t.value for t in ended.trials if t.state.name == "COMPLETE"}
    best = sorted(complete, key=lambda n: (-(complete[n] or 0.0), n))[:3]
    assert sorted(states_kept) == sorted(best)
    _assert_no_group_is_left()


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(place: Place) -> None:
    changes: dict[str, Any] = {
        "trials": 1, "pruner": "none",
        "parameters": {"epochs": 40, "unfrozen_stages": 2, "lr": 1e-3, "ema_decay": 0.9},
    }  # fmt: skip
    share = Share(workers=2)
    undisturbed = place.run("undisturbed", share=share, **changes)
    killed: list[int] = []
    checkpoint = place.home.studies / "killed" / "checkpoints" / "000000" / "last.pt"
    killer = threading.Thread(target=_kill_one_worker, args=(checkpoint, killed))
    killer.start()
    disturbed = place.run("killed", share=share, **changes)
    killer.join()
    assert killed, "the trial was over before its worker could be killed"
    (expected,), (found,) = undisturbed.outcomes.values(), disturbed.outcomes.values()
    assert found.outcome.status == "complete" and len(found.outcome.curve) == 40
    assert found.outcome.curve == expected.outcome.curve
    assert found.outcome.best_metrics == expected.outcome.best_metrics
    assert len(disturbed.runs) == 1
    _assert_no_group_is_left()


def _kill_one_worker(checkpoint: Path, killed: list[int]) -> None:
    """As soon as there is a checkpoint: the trial is in its second epoch, or little later."""
    give_up = time.monotonic() + 200
    while time.monotonic() < give_up and not checkpoint.exists():
        time.sleep(0.005)
    workers = [pid for pid, text in family(os.getpid()).items() if b"RayTrainWorker" in text]
    for pid in sorted(workers)[-1:]:
        os.kill(pid, signal.SIGKILL)
        if checkpoint.exists():  # The trial has no end yet.
            killed.append(pid)


def test_a_batch_that_does_not_fit_is_infeasible_and_the_study_goes_on(place: Place) -> None:
    ended = place.run(
        "narrow",
        share=Share(),
        memory_bytes=40_000_000,
        trials=4,
        pruner="none",
        sampler="grid",
        parameters={
            "batch_size": [16, 100_000],
            "unfrozen_stages": [1, 2],
            "lr": 1e-3,
            "epochs": 1,
        },
    )
    sizes = {t.number: ended.outcomes[t.number].settings["batch_size"] for t in ended.trials}
    assert sorted(sizes.values()) == [16, 16, 100_000, 100_000]
    for trial in ended.trials:
        tags, status = ended.runs[trial.number].data.tags, ended.runs[trial.number].info.status
        outcome = ended.outcomes[trial.number].outcome
        if sizes[trial.number] == 16:
            assert trial.state.name == "COMPLETE" and trial.constraints == {}
            assert (tags["tuner.status"], status) == ("complete", "FINISHED")
            continue
        assert trial.state.name == "PRUNED" and trial.constraints == {FITS: 1.0}
        assert (tags["tuner.status"], status) == ("infeasible", "FAILED")
        assert outcome.status == "infeasible" and outcome.curve == ()
        assert tags["tuner.reason"] == outcome.reason
        assert "a batch of 100000 does not fit in memory" in outcome.reason
        assert "squeezenet1_1 at 32 px" in outcome.reason
        assert np.isfinite(float(outcome.reason.split("at most ")[1].split()[0]))
    _assert_no_group_is_left()
