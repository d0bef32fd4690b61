"""Models in MLflow: real MLflow on a sqlite file, and a process that knows nothing of us."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from core.encoding.encoders import build_encoder
from core.encoding.pooling import num_pooled_features
from core.errors import InputError
from core.heads import build_head
from core.models.model import load_model, save_ensemble, save_model
from core.models.served import Member
from tuner.tracking import packaging
from tuner.tracking.packaging import build_model, log_model, pip_requirements, prediction_files

CLASSES = ["Action", "N/A", "Sci-Fi"]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (44, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def text(seed: int) -> str:
    return base64.b64encode(picture(seed)).decode()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that pooling can be: average and maximum of the last two stages."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    encoder = build_encoder("squeezenet1_1", weights="none", input_size=48)
    num_features = num_pooled_features(encoder, pooling="avg_max", blocks=2)
    save_model(
        folder,
        encoder=encoder,
        head=build_head("linear", num_features=num_features, num_classes=3, seed=1),
        head_spec={"kind": "linear"},
        class_names=CLASSES,
        pooling="avg_max",
        blocks=2,
        thresholds=[0.2, 0.3, 0.4],
        input_size=48,
    )
    return folder


@pytest.fixture(scope="module")
def ensemble_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads on one backbone, and a third one on pixels."""
    folder = tmp_path_factory.mktemp("saved") / "ensemble"
    shared = build_encoder("squeezenet1_1", weights="none", input_size=48)
    members = []
    for seed, (encoder, kind, weight) in enumerate(
        [
            (shared, "linear", 0.5),
            (shared, "csra", 0.25),
            (build_encoder("ffn", weights="none"), "linear", 0.25),
        ]
    ):
        head = build_head(kind, num_features=encoder.num_features, num_classes=3, seed=seed)
        members.append(
            Member(
                encoder=encoder,
                head=head,
                head_spec={"kind": kind},
                pooling="avg",
                calibration=(1.0 + seed, 0.1),
                weight=weight,
            )
        )
    save_ensemble(folder, members=members, class_names=CLASSES, thresholds=[0.2, 0.3, 0.4])
    return folder


@pytest.fixture(scope="module")
def built(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "mlflow"
    build_model(model_dir, folder, input_example_bytes=picture(0))
    return folder


@pytest.fixture(scope="module")
def loaded(built: Path) -> Any:
    return mlflow.pyfunc.load_model(str(built))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def run_id(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run of its own experiment; the test runs in an empty folder that must stay empty."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = mlflow.get_tracking_uri()
    client = MlflowClient(tracking_uri=address)
    experiment = client.create_experiment(tmp_path.name, str(tmp_path / "artifacts"))
    run = client.create_run(experiment)
    client.log_param(run.info.run_id, "lr", 0.1)
    yield run.info.run_id
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None
    assert list((tmp_path / "cwd").iterdir()) == []


def test_an_ensemble_is_registered_like_any_model(
    ensemble_dir: Path, address: str, run_id: str
) -> None:
    info = log_model(
        ensemble_dir,
        run_id=run_id,
        registered_name="together",
        input_example_bytes=picture(0),
        tracking_uri=address,
    )
    version = MlflowClient(tracking_uri=address).get_model_version("together", info.version)
    model = mlflow.pyfunc.load_model(version.source)
    assert model.metadata.metadata["thresholds"] == [0.2, 0.3, 0.4]
    scores = model.predict(pd.DataFrame({"image": [picture(1), text(2)]}))
    expected = load_model(ensemble_dir).predict([picture(1), picture(2)])
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_logged_model_is_registered_with_all_that_goes_with_it(
    model_dir: Path, address: str, run_id: str
) -> None:
    info = log_model(
        model_dir,
        run_id=run_id,
        registered_name="it's posters",
        input_example_bytes=picture(0),
        tracking_uri=address,
        tags={"study": "s1"},
        metrics={"test/top3_accuracy": 0.5},
    )
    client = MlflowClient(tracking_uri=address)
    version = client.get_model_version_by_alias("it's posters", "challenger")
    assert (info.name, info.version, info.uri) == ("it's posters", "1", "models:/it's posters/1")
    assert (str(version.version), version.run_id) == ("1", run_id)
    assert version.tags["study"] == "s1"
    logged = client.get_logged_model(info.model_id)
    assert (logged.status, logged.source_run_id, logged.params) == ("READY", run_id, {"lr": "0.1"})
    assert [(m.key, m.value) for m in logged.metrics] == [("test/top3_accuracy", 0.5)]
    run = client.get_run(run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [info.model_id]
    assert run.data.metrics == {"test/top3_accuracy": 0.5}
    assert "__pycache__" not in {path.name for path in Path(version.source).rglob("*")}
    stored = mlflow.models.Model.load(version.source)
    assert (stored.run_id, stored.model_id) == (run_id, info.model_id)


def test_logging_again_finds_the_version_and_sets_the_alias(
    model_dir: Path, address: str, run_id: str
) -> None:
    settings: dict[str, Any] = {
        "run_id": run_id,
        "registered_name": "again",
        "input_example_bytes": picture(0),
        "tracking_uri": address,
    }
    first = log_model(model_dir, **settings, alias=None)
    client = MlflowClient(tracking_uri=address)
    assert client.get_registered_model("again").aliases == {}
    assert log_model(model_dir, **settings) == first
    aliases = client.get_registered_model("again").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"challenger": "1"}
    assert len(client.search_model_versions("name = 'again'")) == 1


def test_a_model_that_does_not_load_is_never_logged(
    model_dir: Path, address: str, run_id: str, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model_dir, tmp_path / "damaged")
    (damaged / "head.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"head\.safetensors: is damaged"):
        log_model(
            damaged,
            run_id=run_id,
            registered_name="broken",
            input_example_bytes=picture(0),
            tracking_uri=address,
        )
    client = MlflowClient(tracking_uri=address)
    run = client.get_run(run_id)
    assert client.search_logged_models([run.info.experiment_id]) == []
    assert client.search_registered_models("name = 'broken'") == []


def test_a_failed_upload_is_marked_and_not_registered(
    model_dir: Path, address: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
    with pytest.raises(OSError, match="no space left"):
        log_model(
            model_dir,
            run_id=run_id,
            registered_name="unlucky",
            input_example_bytes=picture(0),
            tracking_uri=address,
        )
    client = MlflowClient(tracking_uri=address)
    (logged,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert logged.status == "FAILED"
    assert client.search_registered_models("name = 'unlucky'") == []


ALONE = """
import json, socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("core", "tuner", "search_spaces"):
            raise ImportError(f"{name} must not be imported")

class Offline(socket.socket):
    def connect(self, address):
        raise OSError("no network in this test")

sys.meta_path.insert(0, Blocked())
socket.socket = Offline
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
scores = model.predict(pd.DataFrame({"image": json.load(sys.stdin)}))
loaded = [m for m in sys.modules if m.split(".")[0] in ("core", "tuner", "search_spaces")]
print(json.dumps({"columns": list(scores.columns), "rows": scores.values.tolist(), "ours": loaded}))
"""


@pytest.mark.parametrize("kind", ["single", "ensemble"])
def test_it_loads_alone_without_pickle_and_without_network(
    kind: str, model_dir: Path, ensemble_dir: Path, tmp_path: Path
) -> None:
    model_dir = {"single": model_dir, "ensemble": ensemble_dir}[kind]
    built = tmp_path / "mlflow"
    build_model(model_dir, built, input_example_bytes=picture(0))
    result = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(built)],
        input=json.dumps([text(1), text(2)]),
        env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["columns"] == CLASSES
    assert answer["ours"] == []
    expected = load_model(model_dir).predict([picture(1), picture(2)])
    np.testing.assert_allclose(answer["rows"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "cells",
    [
        [picture(1), picture(2)],
        [text(1), text(2)],
        [picture(1), text(2)],
        [bytearray(picture(1)), base64.encodebytes(picture(2)).decode()],
    ],
    ids=["bytes", "base64", "mixed", "wrapped"],
)
def test_bytes_and_base64_are_the_same(loaded: Any, model_dir: Path, cells: list[Any]) -> None:
    scores = loaded.predict(pd.DataFrame({"image": cells}, index=[7, 9]))
    expected = load_model(model_dir).predict([picture(1), picture(2)])
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert list(scores.columns) == CLASSES
    assert list(scores.index) == [7, 9]
    assert {str(dtype) for dtype in scores.dtypes} == {"float32"}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"image": [picture(1), picture(2)[:200]]}, "row 1: the picture is damaged"),
        ({"image": [picture(1), b"no picture at all"]}, "row 1: this is not a picture"),
        ({"image": [text(1), "%%%"]}, "row 1: the string is not base64"),
        ({"image": [picture(1), None]}, "row 1: expected image bytes or a base64 string"),
        ({"image": [1, 2]}, "Incompatible input types for column image"),
        ({"poster": [picture(1)]}, "missing inputs"),
    ],
)
def test_a_bad_request_says_which_row(loaded: Any, frame: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        loaded.predict(pd.DataFrame(frame))
    assert caught.value.get_http_status_code() == 400


def test_an_empty_request_has_an_empty_answer(loaded: Any) -> None:
    scores = loaded.predict(pd.DataFrame({"image": pd.Series([], dtype=object)}))
    assert scores.shape == (0, 3)
    assert list(scores.columns) == CLASSES


def test_mlflows_own_server_answers(loaded: Any, model_dir: Path) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    def ask(image: str) -> Any:
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}})
        schema = loaded.metadata.get_input_schema()
        return invocations(body, "application/json", loaded, schema)

    (row,) = json.loads(ask(text(1)).response)["predictions"]
    assert list(row) == CLASSES
    expected_C = load_model(model_dir).predict([picture(1)])[0]
    np.testing.assert_allclose(list(row.values()), expected_C, atol=1e-6)
    with pytest.raises(MlflowException, match="row 0: this is not a picture") as caught:
        ask(base64.b64encode(b"no picture").decode())
    assert caught.value.get_http_status_code() == 400


def test_signature_example_and_requirements_are_kept(built: Path) -> None:
    model = mlflow.models.Model.load(str(built))
    assert model.signature.inputs.to_dict() == [
        {"type": "binary", "name": "image", "required": True}
    ]
    assert model.signature.outputs.input_names() == CLASSES
    assert model.metadata == {
        "class_names": CLASSES,
        "thresholds": [0.2, 0.3, 0.4],
        "input_size": 48,
    }
    example = model.load_input_example(str(built))
    assert base64.b64decode(example["image"][0]) == picture(0) or example["image"][0] == picture(0)
    lines = (built / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == list(packaging.REQUIREMENTS)
    assert not [path for path in built.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]


def test_two_versions_of_the_code_live_in_one_process(
    built: Path, loaded: Any, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(built, tmp_path / "other")
    source = other / "artifacts" / "code" / "models" / "served.py"
    code = source.read_text()
    assert "torch.sigmoid(logits_BC)" in code
    source.write_text(code.replace("torch.sigmoid(logits_BC)", "1 - torch.sigmoid(logits_BC)"))
    impostor = ModuleType("core")
    monkeypatch.setitem(sys.modules, "core", impostor)
    frame = pd.DataFrame({"image": [picture(1)]})
    scores = mlflow.pyfunc.load_model(str(other)).predict(frame)
    np.testing.assert_allclose(scores, 1 - loaded.predict(frame), atol=1e-6)
    np.testing.assert_allclose(loaded.predict(frame), load_model(model_dir).predict([picture(1)]))
    assert sys.modules["core"] is impostor


def test_a_model_outlives_the_folder_that_it_was_loaded_from(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    code = copy / "artifacts" / "code" / "errors.py"
    code.write_text(code.read_text() + "\n# another version\n")
    model = mlflow.pyfunc.load_model(str(copy))
    shutil.rmtree(copy)
    assert model.predict(pd.DataFrame({"image": [picture(1)]})).shape == (1, 3)


def test_only_prediction_code_is_shipped() -> None:
    names = {path.stem for path in prediction_files()}
    assert {"model", "errors", "heads", "pictures", "encoders"} <= names
    assert not names & {"config", "table", "split", "stack", "losses", "optimizers", "metrics"}


def imported(paths: list[Path]) -> set[str]:
    """Top-level names of absolute imports."""
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_requirements_cover_what_the_shipped_code_imports() -> None:
    """Two sources: the imports in the code, and the list that the model carries."""
    script = Path(packaging.__file__).parent / "serving_model.py"
    needed = {{"PIL": "pillow"}.get(n, n) for n in imported([*prediction_files(), script])}
    optional = {*packaging.EXTRA_REQUIREMENTS.values(), "huggingface_hub"}  # timm's, for downloads
    assert needed <= {*packaging.REQUIREMENTS, *optional}


@pytest.mark.parametrize(
    ("backbone", "extra"),
    [("timm/resnet18", ["timm"]), ("onnx/a.onnx", ["onnxruntime"]), ("vgg16", [])],
)
def test_optional_libraries_are_required_where_needed(backbone: str, extra: list[str]) -> None:
    names = [line.split("==")[0] for line in pip_requirements(backbone)]
    assert names == [*packaging.REQUIREMENTS, *extra]


def test_an_ensemble_requires_what_its_members_need() -> None:
    names = [line.split("==")[0] for line in pip_requirements("vgg16", "onnx/a.onnx", "timm/b")]
    assert names == [*packaging.REQUIREMENTS, "timm", "onnxruntime"]


def test_build_labels_are_cut_from_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging.importlib.metadata, "version", lambda name: "2.15.0+cpu")
    assert "torch==2.15.0" in pip_requirements("vgg16")


def test_importing_the_module_stays_cheap() -> None:
    code = (
        "import sys, tuner.tracking.packaging; "
        "print(*(m for m in ('torch', 'mlflow') if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == ""
