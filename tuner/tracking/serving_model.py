"""The script that MLflow runs to load a logged model (models-from-code: nothing is pickled).

It is copied into the model and stands alone there: the prediction code travels as the artifact
`code` and is imported under a name made of its content, so that neither this repository, another
package called `core`, nor a second model of another version can get in its way.
Nothing imports this file as a module: it hands its model to MLflow when run.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

COLUMN = "image"


class PictureClassifier(PythonModel):
    """DataFrame with a column `image` in; DataFrame with one probability column a class out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Called once, after MLflow has the artifacts `model` and `code` on this machine."""
        package = import_shipped(Path(context.artifacts["code"]))
        self._classifier = package["models.model"].load_model(Path(context.artifacts["model"]))
        self._bad_input: type[ValueError] = package["errors"].InputError

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Probabilities in the table's class order, one row a picture, the input's index kept.

        A cell is the bytes of an image file, or the same in base64. Raises MlflowException
        (a bad request, status 400) naming the first row, counted from 0, that is neither.
        """
        if COLUMN not in model_input.columns:
            raise _bad_request(f"no column {COLUMN!r} among {list(model_input.columns)}")
        pictures = [picture_bytes(row, cell) for row, cell in enumerate(model_input[COLUMN])]
        try:
            probabilities_NC = self._classifier.predict(pictures)
        except self._bad_input as error:
            raise _bad_request(str(error)) from error
        names = list(self._classifier.class_names)
        return pd.DataFrame(probabilities_NC, columns=names, index=model_input.index)


def picture_bytes(row: int, cell: Any) -> bytes:
    """The bytes in one cell of the input; base64 may be wrapped in lines, as MLflow writes it."""
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell)
    if not isinstance(cell, str):
        kind = type(cell).__name__
        raise _bad_request(f"row {row}: expected image bytes or a base64 string, but got {kind}")
    try:
        return base64.b64decode("".join(cell.split()), validate=True)
    except binascii.Error as error:
        raise _bad_request(f"row {row}: the string is not base64: {error}") from error


def import_shipped(folder: Path) -> dict[str, types.ModuleType]:
    """Every module of the shipped package, by its name in there, such as `models.model`.

    All are imported at once, as `folder` may be a temporary copy that does not live long. The
    interpreter's import locks make this safe in threads.
    """
    files = sorted(folder.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    name = f"_poster_tuner_{digest.hexdigest()[:16]}"
    package = sys.modules.setdefault(name, types.ModuleType(name, __doc__))
    package.__path__ = [str(folder)]
    modules = [".".join(file.relative_to(folder).with_suffix("").parts) for file in files]
    return {module: importlib.import_module(f"{name}.{module}") for module in modules}


def _bad_request(message: str) -> MlflowException:
    error: MlflowException = MlflowException.invalid_parameter_value(message)
    return error


mlflow.models.set_model(PictureClassifier())
