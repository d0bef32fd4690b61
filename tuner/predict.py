"""Using a logged model: find it, predict picture files, and judge it on a labelled table.

Models from MLflow run with the prediction code that they carry, as a server would run them. A
model remembers its data (`data_record`): on the same table its own test split is judged, so that
nobody scores a model on pictures it was trained on by accident.
N: pictures, C: classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core.errors import InputError

from .tracking.model_address import find_model

if TYPE_CHECKING:
    from core.data.table import Table
    from core.models.evaluation import Evaluation

Predict = Callable[[Sequence[bytes]], npt.NDArray[np.float32]]
CHUNK_ROWS = 128
"""Pictures handed to the model at a time: bounds memory, and gives progress a beat."""
PARTS = {"train": "r", "validation": "v", "test": "t"}
"""How `data_record` writes a row's part of the split: one letter a row, `-` for none."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model that is ready to predict."""

    uri: str
    """As it was asked for."""
    class_names: tuple[str, ...]
    thresholds: tuple[float, ...] | None
    """Probability from which a class counts as predicted; None: not tuned."""
    metadata: Mapping[str, Any]
    """What training wrote about the model."""
    predict: Predict
    """Encoded pictures to probabilities [N, C]; raises an error that names the bad row."""


@dataclass(frozen=True, kw_only=True)
class FilePrediction:
    """One picture's outcome."""

    path: Path
    probabilities: Mapping[str, float]
    """Every class, most probable first."""
    predicted: tuple[str, ...] | None
    """Classes at or above their threshold, most probable first; None without thresholds."""

    def to_dict(self) -> dict[str, Any]:
        """JSON, one object a picture."""
        predicted = None if self.predicted is None else list(self.predicted)
        return {
            "image": str(self.path),
            "top3": list(self.probabilities)[:3],
            "predicted": predicted,
            "probabilities": dict(self.probabilities),
        }


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """A model's scores on some rows of a table."""

    model_uri: str
    data: str
    """Folder of the table."""
    split: str
    """`test`, `validation`, `train` or `all`."""
    same_data: bool
    """Whether the table is the one that the model was trained on."""
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """JSON: where the numbers come from, then the metrics."""
        from core.models.evaluation import learnt_nothing

        return {
            "model_uri": self.model_uri,
            "data": self.data,
            "split": self.split,
            "same_data": self.same_data,
            "learnt_nothing": learnt_nothing(self.evaluation),
            **self.evaluation.to_dict(),
        }


def load_predictor(model_uri: str, tracking_uri: str | None = None) -> Predictor:
    """The model of `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/MODEL_ID`,
    `runs:/RUN_ID` or a folder (an MLflow model's or `core.models.model.save_model`'s).

    `tracking_uri` is MLflow's address, None for its own default. Raises InputError for a model
    that does not exist, listing those that do, and for a damaged one.
    """
    from core.models.manifest import MANIFEST_FILE, check_files, read_manifest
    from core.models.model import load_model

    with tempfile.TemporaryDirectory(prefix="tuner-download-") as temporary:
        folder = find_model(model_uri, tracking_uri, Path(temporary))
        is_saved = (folder / MANIFEST_FILE).is_file()
        saved = folder if is_saved else folder / "artifacts" / "model"
        manifest = read_manifest(saved)
        check_files(saved, manifest)  # here, as the code in the model has errors of its own type
        predict: Predict = load_model(folder).predict if is_saved else _load_pyfunc(folder)
    thresholds = manifest["thresholds"]
    return Predictor(
        uri=model_uri,
        class_names=tuple(manifest["class_names"]),
        thresholds=None if thresholds is None else tuple(thresholds),
        metadata=manifest["metadata"],
        predict=predict,
    )


def predict_files(predictor: Predictor, files: Sequence[Path]) -> list[FilePrediction]:
    """What the model says of each picture file, in the order given.

    Raises InputError naming the first file that cannot be read as a picture, before predicting.
    """
    from core.images.pictures import open_picture

    for path in files:
        if path.is_dir():
            raise InputError("is a folder", where=str(path), hint=f"name files: {path}/*.jpg")
        open_picture(path)
    scores_NC = predict_paths(predictor, files)
    predictions = []
    for path, scores_C in zip(files, scores_NC, strict=True):
        order = np.argsort(-scores_C, kind="stable")
        probabilities = {predictor.class_names[c]: float(scores_C[c]) for c in order}
        limits = predictor.thresholds
        chosen = None
        if limits is not None:
            chosen = tuple(predictor.class_names[c] for c in order if scores_C[c] >= limits[c])
        predictions.append(FilePrediction(path=path, probabilities=probabilities, predicted=chosen))
    return predictions


def predict_paths(
    predictor: Predictor,
    paths: Sequence[Path],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Probabilities [N, C] of picture files, read a chunk at a time; progress(done, total)."""
    from core.images.pictures import check_pictures

    parts = [np.empty((0, len(predictor.class_names)), np.float32)]
    for start in range(0, len(paths), CHUNK_ROWS):
        chunk = paths[start : start + CHUNK_ROWS]
        try:
            parts.append(predictor.predict([path.read_bytes() for path in chunk]))
        except Exception:
            # The model knows rows only; if a picture is at fault, say which file.
            problems = check_pictures(chunk)
            if not problems:
                raise
            raise InputError(problems[0].reason, where=str(problems[0].path)) from None
        if progress is not None:
            progress(start + len(chunk), len(paths))
    return np.concatenate(parts)


def data_record(table: Table, parts: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
    """What a model keeps of its data, as `metadata["data"]` of `core.models.model.save_model`.

    `parts` are the row numbers under `train`, `validation` and `test`. JSON, one byte a row.
    """
    letters = np.full(table.num_images, "-")
    for part, rows in parts.items():
        letters[rows] = PARTS[part]
    train_NC = table.targets_NC[parts["train"]]
    return {
        "name": table.name,
        "fingerprint": table.fingerprint(),
        "parts": "".join(letters.tolist()),
        "num_train": len(train_NC),
        "train_counts": train_NC.sum(0, dtype=np.int64).tolist(),
    }


def evaluate_model(
    predictor: Predictor,
    table: Table,
    *,
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelEvaluation:
    """Every metric of the model on rows of a labelled table.

    `split` is `test`, `validation`, `train` or `all`; None takes the test split where there is one
    (the model's own if it was trained on this very table, else the table's split column), and all
    rows otherwise. Raises InputError if the classes differ or the split is unknown.
    """
    from core.models.evaluation import evaluate

    if set(table.class_names) != set(predictor.class_names):
        raise InputError(
            f"classes differ: {sorted(set(table.class_names) ^ set(predictor.class_names))} "
            "are known to one of them only",
            where=f"{table.name} and {predictor.uri}",
            hint="evaluate on a table with the model's classes",
        )
    record = predictor.metadata.get("data")
    same_data = record is not None and record["fingerprint"] == table.fingerprint()
    split, rows = _choose_rows(table, split, record["parts"] if same_data and record else None)
    columns = [table.class_names.index(name) for name in predictor.class_names]
    targets_NC = table.targets_NC[:, columns]
    scores_NC = predict_paths(predictor, [table.paths[row] for row in rows], progress=progress)
    evaluation = evaluate(
        scores_NC,
        targets_NC[rows],
        class_names=predictor.class_names,
        # Without a record the baseline knows the answers' own frequencies: never too low.
        train_targets=targets_NC[rows] if record is None else _train_targets(record),
        thresholds=predictor.thresholds,
    )
    return ModelEvaluation(
        model_uri=predictor.uri,
        data=str(table.root),
        split=split,
        same_data=same_data,
        evaluation=evaluation,
    )


def _load_pyfunc(folder: Path) -> Predict:
    import mlflow.pyfunc
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(folder))

    def predict(pictures: Sequence[bytes]) -> npt.NDArray[np.float32]:
        column = pd.Series(list(pictures), dtype=object)
        scores = model.predict(pd.DataFrame({"image": column}))
        return np.asarray(scores, dtype=np.float32)

    return predict


def _choose_rows(
    table: Table, split: str | None, recorded: str | None
) -> tuple[str, npt.NDArray[np.int64]]:
    """The split's name and its rows, from the model's record or the table's split column."""
    letters: Sequence[str] | None = recorded
    if letters is None and table.given_split is not None:
        letters = [PARTS[part] for part in table.given_split]
    if split is None:
        split = "all" if letters is None or PARTS["test"] not in letters else "test"
    if split == "all":
        return split, np.arange(table.num_images)
    if split not in PARTS:
        raise InputError(
            f"unknown split {split!r}", where="--split", hint=f"valid: all, {', '.join(PARTS)}"
        )
    if letters is None:
        raise InputError(
            f"this table has no {split} split: the model was trained on other data, "
            "and there is no split column",
            where="--split",
            hint="take --split all",
        )
    rows = np.flatnonzero(np.array(list(letters)) == PARTS[split])
    if not len(rows):
        raise InputError(f"the {split} split is empty", where="--split", hint="take another one")
    return split, rows


def _train_targets(record: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Targets [N, C] with the training split's class frequencies, which is all a prior reads."""
    counts_C = np.array(record["train_counts"])
    return (np.arange(record["num_train"])[:, None] < counts_C).astype(np.uint8)
