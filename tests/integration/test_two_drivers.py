"""Two drivers of one study, as two people run them: real processes, Rays, PostgreSQL, MLflow."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient

from core.synth import draw_posters
from tuner.drivers.presence import OWNER, PREFIX
from tuner.drivers.turns import BUDGET

from ..servers import mlflow_server, postgres_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TRIALS = 24
SPACE = f"""
name: shared
trials: {NUM_TRIALS}
cohort_size: 2
pruner: {{name: successive_halving, min_epochs: 100}}
sampler: {{name: tpe, startup_trials: 8}}
parameters:
  backbone: ffn
  image_size: 16
  head: linear
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  weight_decay: {{low: 1.0e-2, high: 1, log: true}}
  batch_size: 32
  epochs: EPOCHS
"""
TWO_PARTS = """
name: staged
probe:
  trials: 12
  cohort_size: 2
  pruner: none
  sampler: random
  parameters:
    backbone: squeezenet1_1
    image_size: 32
    head: linear
    lr: {low: 1.0e-3, high: 1.0e-2, log: true}
    batch_size: 32
    epochs: 300
finetune:
  from_probes: 2
  trials: 8
  cohort_size: 1
  pruner: none
  sampler: random
  parameters:
    backbone: squeezenet1_1
    image_size: 32
    head: linear
    head_start: probe
    unfrozen_stages: 1
    lr: {low: 1.0e-4, high: 1.0e-3, log: true}
    batch_size: 32
    epochs: 6
"""
QUICK = ("--finalists", "2", "--seeds", "1")


class Machine:
    """A home folder, and the same pictures in a place of its own."""

    def __init__(self, root: Path, tracking_uri: str, data: Path) -> None:
        self.home = root / "home"
        self.data = root / "drawn"
        self.tracking_uri = tracking_uri
        shutil.copytree(data, self.data)

    @contextmanager
    def tuner(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """`tuner ARGUMENTS`, killed at the end of the block if it is still there."""
        environment = {**os.environ, "TUNER_HOME": str(self.home)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "tuner", *arguments],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, *arguments: str) -> str:
        with self.tuner(*arguments) as process:
            return output_of(process)

    def trials(self, study: str) -> dict[int, dict[str, Any]]:
        lines = self.run("trials", study, "--json").splitlines()
        return {trial["number"]: trial for trial in map(json.loads, lines)}

    def outcomes(self, study: str) -> list[int]:
        """Numbers of the trials that this machine ran to their end."""
        path = self.home / "studies" / study / "outcomes.jsonl"
        if not path.exists():
            return []
        return [json.loads(line)["number"] for line in path.read_text().splitlines() if line]


def output_of(process: subprocess.Popen[str], seconds: float = 400) -> str:
    """All that it prints until it ends well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drawn"
    draw_posters(folder, num_images=120, size=(48, 72))
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        if server is None:
            pytest.skip("there is no PostgreSQL here (initdb), or no psycopg2")
        yield server.url


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server: a process that is frozen in the middle of a write would lock a file for all."""
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(f"sqlite:///{folder}/mlflow.db", folder) as uri:
        yield uri


@pytest.fixture
def machines(tmp_path: Path, data: Path, uri: str) -> tuple[Machine, Machine]:
    return Machine(tmp_path / "one", uri, data), Machine(tmp_path / "two", uri, data)


def space_file(folder: Path, epochs: int) -> str:
    path = folder / "shared.yaml"
    path.write_text(SPACE.replace("EPOCHS", str(epochs)))
    return str(path)


def search(machine: Machine, study: str, *, epochs: int, storage: str | None = None) -> list[str]:
    place = ["--storage", storage] if storage else []
    return [
        "search", space_file(machine.data.parent, epochs), "--data", str(machine.data),
        "--weights", "none", "--study", study, "--tracking-uri", machine.tracking_uri, *QUICK,
        *place,
    ]  # fmt: skip


def wait_for(
    what: Callable[[], object], *processes: subprocess.Popen[str], seconds: float = 200
) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, f"waited {seconds} s"
        time.sleep(0.5)


def begun(storage: str, study: str) -> bool:
    """Whether the first driver has said how many trials there are."""
    if study not in optuna.get_all_study_names(storage):
        return False
    return BUDGET in optuna.load_study(study_name=study, storage=storage).user_attrs


def num_drivers(storage: str, study: str) -> int:
    attributes = optuna.load_study(study_name=study, storage=storage).user_attrs
    return sum(name.startswith(PREFIX) for name in attributes)


def has_trials(storage: str, study: str, process: subprocess.Popen[str]) -> bool:
    """Whether a trial was given to this process."""
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    return any(f"-{process.pid}-" in trial.user_attrs.get(OWNER, "") for trial in trials)


@contextmanager
def frozen(process: subprocess.Popen[str]) -> Iterator[None]:
    """It must not be done before another one has even started."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def owners(storage: str | None, machine: Machine, study: str) -> dict[int, str]:
    """The driver of each trial, by number."""
    from tuner.home import Home
    from tuner.studies.study import open_study

    state = open_study(Home(root=machine.home), study).optuna()
    trials = state.get_trials(deepcopy=False)
    assert not [trial.number for trial in trials if not trial.state.is_finished()]
    return {trial.number: trial.user_attrs["driver"] for trial in trials}


def assert_whole(machine: Machine, study: str) -> None:
    """One run a trial under one parent, with its curve; none is left running."""
    client = MlflowClient(machine.tracking_uri)
    experiment = client.get_experiment_by_name("drawn")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], f"tags.`tuner.study` = '{study}'"))
    (parent,) = [run for run in runs if run.data.tags["tuner.trial"] == "study"]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    numbers = sorted(int(run.data.tags["tuner.trial"]) for run in children)
    assert numbers == list(range(NUM_TRIALS))
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = machine.trials(study)
    assert sorted(trials) == list(range(NUM_TRIALS))
    for run in children:
        trial = trials[int(run.data.tags["tuner.trial"])]
        assert run.data.tags["tuner.status"] == trial["status"]
        curve = client.get_metric_history(run.info.run_id, "validation_top3_accuracy")
        assert sorted(point.step for point in curve) == list(range(1, trial["epochs"] + 1))


def best_of(output: str) -> tuple[int, str]:
    """What a joiner prints as the best."""
    found = re.search(r"^best: trial (\d+), top3_accuracy (\S+ %)", output, re.MULTILINE)
    assert found, output
    return int(found[1]), found[2]


def test_two_homes_share_a_study(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    with first.tuner(*search(first, "shared", epochs=600, storage=url)) as leader:
        wait_for(lambda: begun(url, "shared"), leader)
        join = ["join", "shared", "--storage", url, "--data", str(second.data)]
        with second.tuner(*join) as joiner:
            with frozen(leader):
                wait_for(lambda: num_drivers(url, "shared") == 2, joiner)
            joined = output_of(joiner)
        ended = output_of(leader)
    ran = first.outcomes("shared"), second.outcomes("shared")
    assert min(len(ran[0]), len(ran[1])) >= 2, ran
    assert sorted([*ran[0], *ran[1]]) == list(range(NUM_TRIALS)), "disjoint, and all"
    by_driver = owners(url, first, "shared")
    assert len(set(by_driver.values())) == 2
    assert len({by_driver[n] for n in ran[0]}) == len({by_driver[n] for n in ran[1]}) == 1
    number, value = best_of(joined)
    assert f"shared: {NUM_TRIALS} trials" in joined and f"{NUM_TRIALS} trials" in ended
    assert re.search(rf"│ +{number} +│ +{value} +│", ended), (number, value, ended)
    assert first.trials("shared") == second.trials("shared")
    assert "The process that began the study is gone" not in joined
    assert "models:/drawn@challenger" in ended and "models:" not in joined
    assert_whole(first, "shared")
    assert not (second.home / "studies" / "shared" / "winner.json").exists()


def test_both_parts_are_shared(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    command = search(first, "staged", epochs=1, storage=url)
    (first.data.parent / "shared.yaml").write_text(TWO_PARTS)
    with first.tuner(*command) as leader:
        wait_for(lambda: begun(url, "staged"), leader)
        join = ["join", "staged", "--storage", url, "--data", str(second.data)]
        with second.tuner(*join) as joiner:
            with frozen(leader):
                wait_for(lambda: num_drivers(url, "staged") == 2, joiner)
            joined = output_of(joiner)
        ended = output_of(leader)
    assert "staged: 12 trials" in joined and "staged-finetune: 8 trials" in joined
    for study, total in (("staged", 12), ("staged-finetune", 8)):
        ran = first.outcomes(study), second.outcomes(study)
        assert sorted([*ran[0], *ran[1]]) == list(range(total))
        assert set(owners(url, first, study)) == set(range(total))
    assert ran[0] and ran[1], "one of them ran nothing of the second part"
    heads = [m.home / "studies" / "staged-finetune" / "heads" for m in machines]
    files = [sorted(path.name for path in folder.iterdir()) for folder in heads]
    assert files[0] == files[1] and len(files[0]) == 2
    assert "models:/drawn@challenger" in ended


def test_the_joiner_ends_what_a_killed_leader_began(
    machines: tuple[Machine, Machine], url: str
) -> None:
    first, second = machines
    with first.tuner(*search(first, "orphaned", epochs=600, storage=url)) as leader:
        wait_for(lambda: begun(url, "orphaned"), leader)
        join = ["join", "orphaned", "--storage", url, "--data", str(second.data)]
        with second.tuner(*join) as joiner:
            with frozen(leader):
                wait_for(lambda: num_drivers(url, "orphaned") == 2, joiner)
            wait_for(lambda: has_trials(url, "orphaned", joiner), leader, joiner)
            os.killpg(leader.pid, signal.SIGKILL)
            killed = time.monotonic()
            leader.communicate()
            assert not (first.home / "studies" / "orphaned" / "winner.json").exists()
            joined = output_of(joiner)
            print(f"the joiner ended {time.monotonic() - killed:.0f} s after the kill")
    assert "The process that began the study is gone" in joined
    assert "tuner resume orphaned" in joined
    ran = first.outcomes("orphaned"), second.outcomes("orphaned")
    assert sorted({*ran[0], *ran[1]}) == list(range(NUM_TRIALS))
    assert len(ran[0]) + len(ran[1]) == NUM_TRIALS, "a trial was run to its end twice"
    number, value = best_of(joined)
    ended = first.run("resume", "orphaned")
    assert re.search(rf"│ +{number} +│ +{value} +│", ended), ended
    assert_whole(first, "orphaned")


def test_a_leader_takes_over_from_a_killed_joiner_in_one_home(
    machines: tuple[Machine, Machine],
) -> None:
    """On the journal file. Who joins a finished study has nothing to do."""
    first, _ = machines
    study = "local"
    with first.tuner(*search(first, study, epochs=600)) as leader:
        log = first.home / "studies" / study / "journal.log"
        wait_for(lambda: log.exists() and f'"{BUDGET}"' in log.read_text(), leader)
        with first.tuner("join", study) as joiner:
            drivers = first.home / "studies" / study / ".drivers"
            with frozen(leader):
                wait_for(lambda: len(list(drivers.iterdir())) == 2, joiner)
            wait_for(lambda: f"-{joiner.pid}-" in _owned(log), leader, joiner)
            os.killpg(joiner.pid, signal.SIGKILL)
            joiner.communicate()
        ended = output_of(leader)
    assert f"{NUM_TRIALS} trials" in ended
    assert sorted(first.outcomes(study)) == list(range(NUM_TRIALS))
    assert_whole(first, study)
    again = first.run("join", study)
    assert f"local: {NUM_TRIALS} trials" in again
    assert sorted(first.outcomes(study)) == list(range(NUM_TRIALS))


def _owned(log: Path) -> str:
    """The lines of Optuna's journal that say whose a trial is."""
    lines = log.read_text().splitlines()
    return "\n".join(line for line in lines if f'"{OWNER}":"' in line)
