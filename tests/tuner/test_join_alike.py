"""What a joiner must have in common with the first driver: weights, and where latency counts the
hardware. Otherwise it is refused before it takes a trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torchvision
from rich.console import Console

from core.data.split import Split
from core.errors import InputError
from tuner.drivers import hardware
from tuner.drivers.hardware import HARDWARE, check_hardware, cpu_model, describe, keep_hardware
from tuner.drivers.join_home import JoinFlags, study_here
from tuner.home import Home
from tuner.preparation import SearchRequest, prepare
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace, load_space
from tuner.studies.shared_record import publish_study
from tuner.studies.study import Study, create_study, open_study
from tuner.trials.cluster import Machine, Workers

from .small_drivers import study_in

SPACE = """\
name: tiny
trials: 2
parameters: {backbone: [ffn, squeezenet1_1], image_size: 32, epochs: 2}
"""
CPU = Workers(count=1, cpus=2, gpus=0, machines=(Machine(cpus=2),))
GPU = Workers(count=1, cpus=4, gpus=1, machines=(Machine(cpus=4, gpus=1),))
Refused = Callable[..., str]


# ---- weights ------------------------------------------------------------------------------


def weights_in(folder: Path, seed: int) -> Path:
    folder.mkdir()
    torch.manual_seed(seed)
    network = torchvision.models.squeezenet1_1()
    torch.save(network.state_dict(), folder / "squeezenet1_1.pth")
    return folder


class Elsewhere:
    """A study begun in another home, with weights from a folder there."""

    def __init__(self, root: Path, data: Path) -> None:
        self.url = f"sqlite:///{root}/optuna.db"
        self.weights = weights_in(root / "weights", seed=1)
        (root / "tiny.yaml").write_text(SPACE)
        self.home = Home(root=root / "there")
        self.home.studies.mkdir(parents=True)
        request = SearchRequest(
            space=load_space(str(root / "tiny.yaml")), data={"data": data}, study="shared",
            storage=self.url, tracking_uri=f"sqlite:///{root}/mlflow.db", weights_dir=self.weights,
        )  # fmt: skip
        record, _, split = prepare(request, self.home, Console(quiet=True))
        self.study = create_study(self.home, record)
        split.save(self.study.split_path)
        self.study.optuna(new=True)
        publish_study(self.study, split)

    def join(self, home: Path, **flags: Any) -> tuple[Study, Any, Split]:
        here = Home(root=home)
        here.studies.mkdir(parents=True, exist_ok=True)
        flags = {"storage": self.url, **flags}
        return study_here("shared", here, Console(quiet=True), JoinFlags(**flags))


@pytest.fixture
def there(tmp_path: Path, data: Path) -> Elsewhere:
    return Elsewhere(tmp_path, data)


def test_a_joiner_with_another_file_of_the_same_name_is_refused(
    there: Elsewhere, tmp_path: Path, home: Path, refused: Refused
) -> None:
    other = weights_in(tmp_path / "other", seed=2)
    file = str(other / "squeezenet1_1.pth")
    says = (file, "not the weights of squeezenet1_1 at 32 px", "--weights DIR")
    refused("join", "shared", "--storage", there.url, "--weights", other, says=says)
    with pytest.raises(InputError, match="--weights none"):
        there.join(home, weights="none")
    assert not list((home / "studies").iterdir())


def test_a_joiner_with_a_copy_of_the_file_is_let_in(
    there: Elsewhere, tmp_path: Path, home: Path
) -> None:
    copy = weights_in(tmp_path / "copy", seed=1)
    study, *_ = there.join(home, weights=str(copy))
    assert study.record.weights_dir == str(copy)
    labels = {"ffn at 32 px", "squeezenet1_1 at 32 px"}
    assert set(study.record.weight_fingerprints) == labels
    assert study.record.weight_fingerprints == there.study.record.weight_fingerprints


def test_weights_that_were_replaced_since_are_found_out_in_the_same_home(
    there: Elsewhere,
) -> None:
    there.join(there.home.root, storage=None)
    (there.weights / "squeezenet1_1.pth").unlink()
    there.weights.rmdir()
    weights_in(there.weights, seed=3)
    with pytest.raises(InputError, match="not the weights of squeezenet1_1"):
        there.join(there.home.root, storage=None)


def test_a_study_of_an_earlier_version_is_not_compared(there: Elsewhere, tmp_path: Path) -> None:
    path = there.study.folder / "study.json"
    record = json.loads(path.read_text())
    record["weight_fingerprints"]["squeezenet1_1 at 32 px"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="not the weights"):
        there.join(there.home.root, storage=None)
    del record["weight_fingerprints"]
    path.write_text(json.dumps(record))
    assert open_study(there.home, "shared").record.weight_fingerprints == {}
    there.join(there.home.root, storage=None)


# ---- hardware -----------------------------------------------------------------------------


def space(**goals: Any) -> SearchSpace:
    return parse_space(
        {"name": "s", "trials": 2, "parameters": {"backbone": "ffn", "epochs": 2}, **goals}
    )


LATENCY = [
    {"constraints": {"latency_ms": 20}},
    {"objectives": ["top3_accuracy", "latency_ms"]},
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say what machine this is from now on."""

    def be(name: str) -> None:
        monkeypatch.setattr(hardware, "hardware_of", lambda workers: name)

    return be


@pytest.mark.parametrize("goals", LATENCY)
def test_an_unlike_machine_is_refused_where_latency_counts(
    tmp_path: Path, machine: Callable[[str], None], goals: dict[str, Any]
) -> None:
    study, of = study_in(tmp_path, "s"), space(**goals)
    machine("Old CPU, 2 threads")
    keep_hardware(study, of, CPU)
    check_hardware(study, of, CPU)
    machine("New CPU, 2 threads")
    with pytest.raises(InputError, match=r"measured on Old CPU, .* this is New CPU, 2 threads"):
        check_hardware(study, of, CPU)
    keep_hardware(study, of, CPU)  # A resume elsewhere: what was measured stays as it was.
    assert study.optuna().user_attrs[HARDWARE] == "Old CPU, 2 threads"


@pytest.mark.parametrize("goals", [{}, {"constraints": {"size_mb": 9}}])
def test_without_latency_any_machine_may_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goals: dict[str, Any]
) -> None:
    monkeypatch.setattr(hardware, "hardware_of", lambda workers: pytest.fail("nobody asked"))
    study, of = study_in(tmp_path, "s"), space(**goals)
    keep_hardware(study, of, CPU)
    check_hardware(study, of, CPU)
    assert HARDWARE not in study.optuna().user_attrs


def test_a_study_that_did_not_note_its_hardware_is_refused(
    tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("b")
    with pytest.raises(InputError, match="did not note on what"):
        check_hardware(study_in(tmp_path, "s"), space(**LATENCY[0]), CPU)


def test_a_worker_says_what_it_computes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray is asked for a worker like those of the trials; here it is this process."""
    asked: list[dict[str, float]] = []

    class Task:
        def __init__(self, work: Callable[..., str]) -> None:
            self.remote = work

    def remote(**resources: float) -> Callable[..., Task]:
        asked.append(resources)
        return Task

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda found: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fast GPU")
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\n\nmodel name\t: other\n")
    monkeypatch.setattr(hardware, "CPU_INFO", info)
    assert hardware.hardware_of(CPU) == "Some CPU @ 2 GHz, 2 threads"
    assert hardware.hardware_of(GPU) == "Fast GPU, Some CPU @ 2 GHz, 4 threads"
    assert asked == [{"num_cpus": 2, "num_gpus": 0}, {"num_cpus": 4, "num_gpus": 1}]
    assert describe(False) == "Some CPU @ 2 GHz"
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "none")
    assert cpu_model()
