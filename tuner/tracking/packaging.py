"""A saved model directory into MLflow: a pyfunc model, logged, registered and given an alias.

Everything is built, loaded and tried on the example picture in a temporary folder before MLflow
hears of it, so a model that does not load is never registered. Only clients with an explicit
address are used: MLflow's global tracking address and active run stay as they are.
The model carries `tuner/tracking/serving_model.py` (models-from-code) and those modules of `core`
that prediction imports; it needs neither this repository nor pickle to load.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import core
from core.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

ENTRY_MODULE = Path("models/model.py")
"""The module of `core` that loads and runs a saved model."""
CORE = Path(core.__file__).parent
MODEL_ARTIFACT = "model"
CODE_ARTIFACT = "code"
DIGEST_TAG = "poster_tuner.model_sha256"
"""On a logged model and its version: which saved model it is, so that logging again finds it."""
MODEL_ID_TAG = "poster_tuner.model_id"
"""On a model version: the logged model, which MLflow's sqlite registry does not keep."""
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch", "torchvision")
EXTRA_REQUIREMENTS = {"timm/": "timm", "onnx/": "onnxruntime"}
"""Prefix of a backbone's name -> what it needs besides."""


@dataclass(frozen=True, kw_only=True)
class ModelVersionInfo:
    """A registered model version."""

    name: str
    """Of the registered model."""
    version: str
    """As MLflow counts them: `1`, `2`, ..."""
    uri: str
    """`models:/NAME/VERSION`."""
    model_id: str
    """MLflow's id of the logged model, `m-...`."""


def log_model(
    model_dir: Path,
    *,
    run_id: str,
    registered_name: str,
    input_example_bytes: bytes,
    tracking_uri: str,
    alias: str | None = "challenger",
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> ModelVersionInfo:
    """Log what `core.models.model.save_model` wrote as a model of the run and register it.

    `input_example_bytes` is a small encoded picture; it is kept with the model. `metrics` are
    logged to the run and tied to the model. What an earlier call already made of the same directory
    (the logged model, its version) is found by a digest and used, not made twice, so that a call
    whose answer was lost can be repeated; the alias is set either way.
    Raises InputError for a damaged directory, MlflowException when the server refuses.
    """
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=tracking_uri)
    digest = _model_digest(model_dir)
    found = _find_version(client, registered_name, run_id, digest)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="tuner-model-") as temporary:
            folder = Path(temporary) / "mlflow"
            build_model(model_dir, folder, input_example_bytes=input_example_bytes)
            logged = _logged_model(client, run_id, tags or {}, digest)
            try:
                _name_owner(folder, logged, run_id)
                client.log_model_artifacts(logged.model_id, str(folder))
            except BaseException:
                with contextlib.suppress(MlflowException):  # It may be away: then it stays PENDING.
                    client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
                raise
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        for key, value in (metrics or {}).items():
            client.log_metric(run_id, key, value, model_id=logged.model_id)
        found = _register(client, registered_name, logged, tags or {}, digest)
    if alias is not None:
        client.set_registered_model_alias(registered_name, alias, found.version)
    return found


def build_model(model_dir: Path, folder: Path, *, input_example_bytes: bytes) -> None:
    """Write the MLflow model of a saved model directory to the new `folder`, and try it.

    Loads what was written as a server would and predicts the example picture. Raises
    InputError if the directory is damaged or the picture cannot be read.
    """
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    from core.models.manifest import check_files, encoder_names, read_manifest

    manifest = read_manifest(model_dir)
    check_files(model_dir, manifest)
    example = pd.DataFrame({"image": [input_example_bytes]})
    outputs = Schema([ColSpec("float", name) for name in manifest["class_names"]])
    with tempfile.TemporaryDirectory(prefix="tuner-code-") as temporary:
        staging = Path(temporary)
        for source in prediction_files():
            target = staging / CODE_ARTIFACT / source.relative_to(CORE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        shutil.copytree(model_dir, staging / MODEL_ARTIFACT)
        script = shutil.copyfile(Path(__file__).parent / "serving_model.py", staging / "serve.py")
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(script),
            artifacts={name: str(staging / name) for name in (MODEL_ARTIFACT, CODE_ARTIFACT)},
            # MLflow's "binary" lets base64 strings through, and its server decodes them.
            signature=ModelSignature(Schema([ColSpec("binary", "image")]), outputs),
            input_example=example,
            pip_requirements=pip_requirements(*encoder_names(manifest)),
            metadata={key: manifest[key] for key in ("class_names", "thresholds", "input_size")},
            uv_project_path=str(staging),  # else files of a uv project in the cwd are copied
        )
    scores = mlflow.pyfunc.load_model(str(folder)).predict(example)
    if list(scores.columns) != manifest["class_names"] or len(scores) != 1:
        raise RuntimeError(f"the packaged model answered with {list(scores.columns)}")
    for pycache in folder.rglob("__pycache__"):
        shutil.rmtree(pycache)


def prediction_files() -> list[Path]:
    """Those files of `core` that loading and running a saved model imports, found by reading
    their relative imports (those inside functions too)."""
    found: set[Path] = set()
    pending = [CORE / ENTRY_MODULE]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                if named.is_dir():
                    pending += [named / f"{alias.name}.py" for alias in node.names]
                else:
                    pending.append(named.with_suffix(".py"))
    return sorted(found)


def pip_requirements(*backbones: str) -> list[str]:
    """What a served model of these backbones needs, pinned to the versions that made it. Build
    labels such as `+cpu` are cut off, as package indexes do not hold them."""
    extra = [
        need
        for prefix, need in EXTRA_REQUIREMENTS.items()
        if any(backbone.startswith(prefix) for backbone in backbones)
    ]
    names = [*REQUIREMENTS, *extra]
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def _model_digest(model_dir: Path) -> str:
    """Of model.json, which holds the checksums of all other files."""
    from core.models.manifest import MANIFEST_FILE

    path = model_dir / MANIFEST_FILE
    if not path.is_file():
        raise InputError("no saved model here: model.json is missing", where=str(model_dir))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _logged_model(
    client: MlflowClient, run_id: str, tags: Mapping[str, str], digest: str
) -> LoggedModel:
    """The run's logged model of this digest, made if it is not there."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    query = f"source_run_id = '{run_id}' AND tags.`{DIGEST_TAG}` = '{digest}'"
    found = client.search_logged_models([run.info.experiment_id], filter_string=query)
    logged = (
        found[0]
        if found
        else client.create_logged_model(
            run.info.experiment_id,
            name="classifier",
            source_run_id=run_id,
            params=run.data.params,
            tags={**tags, DIGEST_TAG: digest},
        )
    )
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _name_owner(folder: Path, logged: LoggedModel, run_id: str) -> None:
    """Write the ids into MLmodel that MLflow's own `log_model` would have written."""
    from mlflow.models import Model

    model = Model.load(str(folder))
    model.run_id = run_id
    model.model_id = model.model_uuid = logged.model_id
    model.artifact_path = logged.artifact_location
    model.save(str(folder / "MLmodel"))


def _find_version(
    client: MlflowClient, name: str, run_id: str, digest: str
) -> ModelVersionInfo | None:
    found = [
        version
        for version in client.search_model_versions(f"run_id = '{run_id}'")
        if version.name == name and version.tags.get(DIGEST_TAG) == digest
    ]
    found.sort(key=lambda version: int(version.version))
    for version in found[1:]:  # Of a call that was given up and was done after all.
        client.delete_model_version(name, version.version)
    return _info(found[0]) if found else None


def _register(
    client: MlflowClient, name: str, logged: LoggedModel, tags: Mapping[str, str], digest: str
) -> ModelVersionInfo:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        # Not `models:/ID`: MLflow's sqlite registry looks that up at the global tracking address.
        source=logged.artifact_location,
        run_id=logged.source_run_id,
        tags={**tags, DIGEST_TAG: digest, MODEL_ID_TAG: logged.model_id},
        model_id=logged.model_id,
    )
    # As MLflow's server does by itself: the model's page links to its version.
    versions = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": versions})
    return _info(version)


def _info(version: Any) -> ModelVersionInfo:
    return ModelVersionInfo(
        name=version.name,
        version=str(version.version),
        uri=f"models:/{version.name}/{version.version}",
        model_id=version.tags[MODEL_ID_TAG],
    )
