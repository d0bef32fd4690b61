"""`model.json` of a saved model: what the model is, and a checksum of each of its files.

Anyone may have written a model that is about to be loaded, so nothing in it is followed out of its
folder. Plain JSON: what a model is can be read without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError

FORMAT_VERSION = 1
"""A model of one member."""
ENSEMBLE_VERSION = 2
"""A model of several: older code refuses it instead of reading half of it."""
MANIFEST_FILE = "model.json"
_KEYS = {
    FORMAT_VERSION: "class_names thresholds calibration pooling input_size encoder head metadata "
    "files",
    ENSEMBLE_VERSION: "class_names thresholds calibration input_size encoders members metadata "
    "files",
}
"""What `model.json` must have."""


def write_manifest(
    folder: Path,
    *,
    format_version: int,
    class_names: Sequence[str],
    thresholds: Sequence[float] | None,
    calibration: tuple[float, float],
    metadata: Mapping[str, Any] | None,
    **parts: Any,
) -> None:
    """Write `model.json` of all that is in `folder`; `parts` are the keys of the version's own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": "poster-tuner model",
        "format_version": format_version,
        "class_names": list(class_names),
        "thresholds": None if thresholds is None else [float(t) for t in thresholds],
        "calibration": [float(value) for value in calibration],
        **parts,
        "metadata": dict(metadata or {}),
        "files": {path.relative_to(folder).as_posix(): _sha256(path) for path in files},
    }
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """`model.json` of a saved model: class names, thresholds, metadata and the rest, as data.

    Raises InputError if it is missing, unreadable, incomplete or of a newer format.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError("no saved model here: model.json is missing", where=str(folder))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"is damaged: {error}", where=str(path)) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in _KEYS:
        raise InputError(
            f"format_version is {version!r}, and this code reads {' and '.join(map(str, _KEYS))}",
            where=str(path),
            hint="load the model with the version of poster-tuner that saved it",
        )
    missing = [key for key in _KEYS[version].split() if key not in manifest]
    if missing:
        raise InputError(f"is damaged: {', '.join(missing)} missing", where=str(path))
    return dict(manifest)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises InputError naming the first file that is missing or not as it was saved."""
    for name, checksum in manifest["files"].items():
        path = folder / name
        if not _stays_inside(name) or not path.is_file():
            raise InputError("is missing from the saved model", where=str(path))
        if _sha256(path) != checksum:
            raise InputError(
                "is damaged: its checksum is not the one in model.json",
                where=str(path),
                hint="save or download the model again",
            )


def encoder_names(manifest: Mapping[str, Any]) -> list[str]:
    """Backbones that a saved model runs, each once."""
    if manifest["format_version"] == FORMAT_VERSION:
        return [str(manifest["encoder"]["backbone"]["name"])]
    return sorted({str(spec["backbone"]["name"]) for spec in manifest["encoders"]})


def _stays_inside(name: str) -> bool:
    """Whether a file's name in a manifest, which anyone may have written, is in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and len(path.parts) <= 2


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
