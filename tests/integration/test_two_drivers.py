"""Two drivers of one study, as two people run them: real processes, Rays, PostgreSQL, MLflow."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import optuna
import pytest

from core.synth import draw_posters
from tuner.drivers.presence import OWNER, PREFIX
from tuner.drivers.turns import BUDGET
from tuner.studies.study import open_study

from ..processes import output_of, wait_for
from ..servers import Postgres, mlflow_server
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TRIALS = 24
# Long enough for the second to start meanwhile.
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
  epochs: 600
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drawn"
    draw_posters(folder, num_images=120, size=(48, 72))
    return folder


@pytest.fixture(scope="module")
def url(postgres: Postgres) -> str:
    return postgres.url


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server: a process that is frozen in the middle of a write would lock a file for all."""
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(f"sqlite:///{folder}/mlflow.db", folder) as uri:
        yield uri


@pytest.fixture
def machines(tmp_path: Path, data: Path, uri: str) -> tuple[Workplace, Workplace]:
    """Two homes, each with the same pictures in a place of its own."""
    return _machine(tmp_path / "one", data, uri), _machine(tmp_path / "two", data, uri)


def _machine(root: Path, data: Path, uri: str) -> Workplace:
    shutil.copytree(data, root / "drawn")
    return Workplace(root, SPACE, tracking_uri=uri, flags=("--finalists", "2", "--seeds", "1"))


# PostgreSQL is asked, so less often than a file is.
_wait_for = partial(wait_for, pause=0.5)


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


@contextmanager
def joining(
    second: Workplace, study: str, url: str, leader: subprocess.Popen[str]
) -> Iterator[subprocess.Popen[str]]:
    """The second machine's driver, once it is one; until then the leader stands still."""
    with second.start("join", study, "--storage", url, "--data", str(second.data)) as joiner:
        with frozen(leader):
            _wait_for(lambda: num_drivers(url, study) == 2, joiner)
        yield joiner


def owners(machine: Workplace, study: str) -> dict[int, str]:
    """The driver of each trial, by number."""
    trials = open_study(machine.home, study).optuna().get_trials(deepcopy=False)
    assert not [trial.number for trial in trials if not trial.state.is_finished()]
    return {trial.number: trial.user_attrs["driver"] for trial in trials}


def assert_whole(machine: Workplace, study: str) -> None:
    """One run a trial under one parent, with its curve; none is left running."""
    trials = machine.trials(study)
    assert sorted(trials) == list(range(NUM_TRIALS))
    machine.check_runs(study, {number: trial["epochs"] for number, trial in trials.items()})
    _, children = machine.runs(study)
    for run in children:
        trial = trials[int(run.data.tags["tuner.trial"])]
        assert run.data.tags["tuner.status"] == trial["status"]


def best_of(output: str) -> tuple[int, str]:
    """What a joiner prints as the best."""
    found = re.search(r"^best: trial (\d+), top3_accuracy (\S+ %)", output, re.MULTILINE)
    assert found, output
    return int(found[1]), found[2]


def test_two_homes_share_a_study(machines: tuple[Workplace, Workplace], url: str) -> None:
    first, second = machines
    with first.start(*first.search("shared", "--storage", url)) as leader:
        _wait_for(lambda: begun(url, "shared"), leader)
        with joining(second, "shared", url, leader) as joiner:
            joined = output_of(joiner)
        ended = output_of(leader)
    ran = first.logged("shared"), second.logged("shared")
    assert min(len(ran[0]), len(ran[1])) >= 2, ran
    assert sorted([*ran[0], *ran[1]]) == list(range(NUM_TRIALS)), "disjoint, and all"
    by_driver = owners(first, "shared")
    assert len(set(by_driver.values())) == 2
    assert len({by_driver[n] for n in ran[0]}) == len({by_driver[n] for n in ran[1]}) == 1
    number, value = best_of(joined)
    assert f"shared: {NUM_TRIALS} trials" in joined and f"{NUM_TRIALS} trials" in ended
    assert re.search(rf"│ +{number} +│ +{value} +│", ended), (number, value, ended)
    assert first.trials("shared") == second.trials("shared")
    assert "The process that began the study is gone" not in joined
    assert "models:/drawn@challenger" in ended and "models:" not in joined
    assert_whole(first, "shared")
    assert not (second.folder("shared") / "winner.json").exists()


def test_both_parts_are_shared(machines: tuple[Workplace, Workplace], url: str) -> None:
    first, second = machines
    first.space.write_text(TWO_PARTS)
    with first.start(*first.search("staged", "--storage", url)) as leader:
        _wait_for(lambda: begun(url, "staged"), leader)
        with joining(second, "staged", url, leader) as joiner:
            joined = output_of(joiner)
        ended = output_of(leader)
    assert "staged: 12 trials" in joined and "staged-finetune: 8 trials" in joined
    for study, total in (("staged", 12), ("staged-finetune", 8)):
        ran = first.logged(study), second.logged(study)
        assert sorted([*ran[0], *ran[1]]) == list(range(total))
        assert set(owners(first, study)) == set(range(total))
    assert ran[0] and ran[1], "one of them ran nothing of the second part"
    heads = [m.folder("staged-finetune") / "heads" for m in machines]
    files = [sorted(path.name for path in folder.iterdir()) for folder in heads]
    assert files[0] == files[1] and len(files[0]) == 2
    assert "models:/drawn@challenger" in ended


def test_the_joiner_ends_what_a_killed_leader_began(
    machines: tuple[Workplace, Workplace], url: str
) -> None:
    first, second = machines
    with first.start(*first.search("orphaned", "--storage", url)) as leader:
        _wait_for(lambda: begun(url, "orphaned"), leader)
        with joining(second, "orphaned", url, leader) as joiner:
            _wait_for(lambda: has_trials(url, "orphaned", joiner), leader, joiner)
            os.killpg(leader.pid, signal.SIGKILL)
            leader.communicate()
            assert not (first.folder("orphaned") / "winner.json").exists()
            joined = output_of(joiner)
    assert "The process that began the study is gone" in joined
    assert "tuner resume orphaned" in joined
    ran = first.logged("orphaned"), second.logged("orphaned")
    assert sorted([*ran[0], *ran[1]]) == list(range(NUM_TRIALS)), "each run to its end once"
    number, value = best_of(joined)
    ended = first.run("resume", "orphaned")
    assert re.search(rf"│ +{number} +│ +{value} +│", ended), ended
    assert_whole(first, "orphaned")


def test_a_leader_takes_over_from_a_killed_joiner_in_one_home(
    machines: tuple[Workplace, Workplace],
) -> None:
    """On the journal file. Who joins a finished study has nothing to do."""
    first, _ = machines
    study = "local"
    with first.start(*first.search(study)) as leader:
        log = first.folder(study) / "journal.log"
        _wait_for(lambda: log.exists() and f'"{BUDGET}"' in log.read_text(), leader)
        with first.start("join", study) as joiner:
            drivers = first.folder(study) / ".drivers"
            with frozen(leader):
                _wait_for(lambda: len(list(drivers.iterdir())) == 2, joiner)
            _wait_for(lambda: f"-{joiner.pid}-" in _owned(log), leader, joiner)
            os.killpg(joiner.pid, signal.SIGKILL)
            joiner.communicate()
        ended = output_of(leader)
    assert f"{NUM_TRIALS} trials" in ended
    assert first.logged(study) == list(range(NUM_TRIALS))
    assert_whole(first, study)
    again = first.run("join", study)
    assert f"local: {NUM_TRIALS} trials" in again
    assert first.logged(study) == list(range(NUM_TRIALS))


def _owned(log: Path) -> str:
    """The lines of Optuna's journal that say whose a trial is."""
    lines = log.read_text().splitlines()
    return "\n".join(line for line in lines if f'"{OWNER}":"' in line)
