"""Spaces, flags, names and weights handed in wrong, through the real command: exit code 2,
a message that says where it is, what is wrong and what would be right, no traceback, and nothing
written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]
SPACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "backbone": ("backbone: resnet51", ("parameters.backbone", "'resnet51'", "did you mean")),
    "loss": ("backbone: ffn\n  loss: bcee", ("line 3", "loss", "'bcee'", "valid: asymmetric")),
    "optimizer": ("backbone: ffn\n  optimizer: adamm", ("'adamm'", "valid: adam, adamw")),
    "lr 0": ("backbone: ffn\n  lr: 0", ("parameters.lr", "lr > 0 must hold")),
    "empty choice": ("backbone: ffn\n  head: []", ("parameters.head", "nothing to choose from")),
    "inverted range": (
        "backbone: ffn\n  lr: {low: 1, high: 0.1}",
        ("parameters.lr.low", "low <= high must hold"),
    ),
    "unknown key": ("backbone: ffn\n  learning_rate: 1", ("'learning_rate'", "valid: ")),
    "condition on nothing": (
        "backbone: ffn\n  momentum: {low: 0.1, high: 0.9, when: {optimizer: sgd}}",
        ("momentum.when.optimizer", "a condition on optimizer, which the space does not have"),
    ),
    "not YAML": ("{backbone", ("line 3: it is not valid YAML",)),
}


@pytest.mark.parametrize("case", SPACES)
def test_space(case: str, refused: Run, data: Path, tmp_path: Path) -> None:
    text, says = SPACES[case]
    path = tmp_path / "bad.yaml"
    path.write_text(f"parameters:\n  {text}\n")
    refused("search", path, "--data", data, says=("bad.yaml", *says))
    refused("space", "check", path, says=("bad.yaml", *says))


@pytest.mark.parametrize("command", [("search",), ("space", "show"), ("space", "check")])
def test_no_such_space(command: tuple[str, ...], refused: Run, data: Path) -> None:
    rest = ("--data", data) if command == ("search",) else ()
    refused(*command, "prob", *rest, says=("prob", "demo, finetune, probe, seed"))


FLAGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--trials", "0"), ("--trials", "at least one trial is needed, but got 0")),
    (("--trials", "many"), ("'--trials'", "'many' is not a valid integer")),
    (("--hours", "-1"), ("--hours", "must be positive, but got -1")),
    (("--hours", "nan"), ("--hours", "must be positive, but got nan")),
    (("--folds", "1"), ("--folds", "at least 2 folds are needed, but got 1", "one part")),
    (("--folds", "0"), ("--folds", "at least 2 folds are needed, but got 0", "one part")),
    (("--folds", "20"), ("posters", "pictures in fold", "has a label", "fewer folds")),
    (("--seed", "-1"), ("'--seed'", "-1 is not in the range")),
    (("--study", "../up"), ("--study", "'../up' cannot name a study", "letters, digits")),
    (("--model", "a/b"), ("--model", "'a/b' cannot name a registered model", "without / and :")),
    (("--weights", "nowhere"), ("--weights nowhere", "no such folder", "NAME.pth", "`none`")),
    (("--frist",), ("No such option", "--frist")),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "says"), FLAGS, ids=[" ".join(f) for f, _ in FLAGS])
def test_flag(
    flags: tuple[str, ...], says: tuple[str, ...], refused: Run, data: Path, space: Path
) -> None:
    refused("search", space, "--data", data, *flags, says=says)
    refused("search", space, "--data", data, *flags, "--dry-run", says=says)


def test_folds_of_fine_tuning(refused: Run, data: Path) -> None:
    refused(
        "search", "finetune", "--data", data, "--folds", "3",
        says=("--folds", "folds are for probes", "leave it out"),
    )  # fmt: skip


def test_study_name_in_use(refused: Run, tuner: Run, home: Path, data: Path, space: Path) -> None:
    kept = home / "studies" / "mine" / "study.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    refused(
        "search", space, "--data", data, "--study", "mine",
        says=("--study", "a study named 'mine' exists", "tuner resume mine"), writes=True,
    )  # fmt: skip
    assert kept.read_text() == "precious"
    ended = tuner("search", space, "--data", data, "--study", "other", "--dry-run")
    assert ended.code == 0, ended.err


def test_study_name_in_use_in_mlflow(
    refused: Run, tuner: Run, mlflow_store: Path, data: Path, space: Path
) -> None:
    """Two homes that share a server must not write into each other's runs."""
    refused(
        "search", space, "--data", data, "--study", "tiny-1",
        says=("--study", "'tiny-1' is in this MLflow or storage already", "another name"),
        writes=True,
    )  # fmt: skip
    ended = tuner("search", space, "--data", data, "--dry-run")
    assert re.search(r"study +tiny-2", ended.out), "a default name is one that is free"


def test_study_name_in_use_in_storage(
    refused: Run, tuner: Run, tmp_path: Path, data: Path, space: Path
) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(storage=storage, study_name="tiny-1")
    common = ("search", space, "--data", data, "--storage", storage)
    refused(*common, "--study", "tiny-1", says=("--study", "'tiny-1' is in this MLflow or storage"))
    assert re.search(r"study +tiny-2", tuner(*common, "--dry-run").out)


def test_unwritable_home(
    tuner: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, space: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        monkeypatch.setenv("TUNER_HOME", str(place))
        ended = tuner("search", space, "--data", data)
        assert ended.code == 2
        assert re.match(f"error: {place}: cannot be written .*\n.*TUNER_HOME\n", ended.err)
    assert (tmp_path / "file").read_text() == "in the way"


def test_unwritable_folder_of_posters(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("data", "synth", folder, says=(f"{folder}: ", "folder"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No download works and none has been made: the way out is a port that refuses."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.mark.usefixtures("offline")
def test_weights_not_at_hand(refused: Run, data: Path, tmp_path: Path) -> None:
    space = tmp_path / "cnn.yaml"
    space.write_text("parameters: {backbone: [ffn, squeezenet1_1]}\n")
    says = (
        "squeezenet1_1: no pretrained weights at hand, and the download failed",
        "fetch https://download.pytorch.org/models/squeezenet1_1",
        "--weights none",
    )
    refused("search", space, "--data", data, says=says)
    refused("search", space, "--data", data, "--dry-run", says=says)
    (tmp_path / "weights").mkdir()
    refused("search", space, "--data", data, "--weights", tmp_path / "weights", says=says)


def test_weights_that_do_not_fit(refused: Run, data: Path, tmp_path: Path) -> None:
    space = tmp_path / "cnn.yaml"
    space.write_text("parameters: {backbone: squeezenet1_1}\n")
    common = ("search", space, "--data", data, "--weights", tmp_path)
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "squeezenet1_1.pth")
    refused(*common, says=("squeezenet1_1.pth: the weights do not fit", "a state dict of squeeze"))
    (tmp_path / "squeezenet1_1.pth").write_bytes(b"<html>404</html>")
    refused(*common, says=("squeezenet1_1.pth: cannot be read as weights", "state dict"))


def test_onnx_weights(refused: Run, data: Path, tmp_path: Path) -> None:
    space = tmp_path / "onnx.yaml"
    space.write_text("parameters: {backbone: onnx/mine.onnx}\n")
    refused("search", space, "--data", data, "--weights", tmp_path, says=("mine.onnx", "--weights"))
    refused(
        "search", space, "--data", data, "--weights", "none",
        says=("onnx/mine.onnx holds its weights itself", "leave ONNX backbones out"),
    )  # fmt: skip


def test_failure_before_the_first_trial_leaves_nothing(
    refused: Run, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path, home: Path,
    data: Path, space: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """A cluster may still refuse: its workers lack the weights, or it has no cores."""
    import optuna
    from mlflow import MlflowClient

    import tuner.search
    from core.errors import InputError

    def refuse(address: str) -> Any:
        raise InputError("no machine has a core to spare", where="--address here", hint="add one")

    monkeypatch.setattr(tuner.search, "cluster", refuse)
    storage = f"sqlite:///{tmp_path}/optuna.db"
    refused(
        "search", space, "--data", data, "--study", "mine", "--storage", storage,
        says=("--address here", "no machine has a core to spare", "add one"), writes=True,
    )  # fmt: skip
    assert not list((home / "studies").iterdir())
    assert optuna.get_all_study_names(storage) == []
    client = MlflowClient(tracking_uri=f"sqlite:///{mlflow_store}")
    experiment = client.get_experiment_by_name("posters")
    assert experiment is not None
    names = [run.info.run_name for run in client.search_runs([experiment.experiment_id])]
    assert names == ["tiny-1"], "only the run that was there before"
