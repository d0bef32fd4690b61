"""A saved classifier: from picture bytes to one probability a class, in one directory.

The directory holds `model.json` (what the model is, with a checksum of every other file),
`head.safetensors` (head and feature statistics) and what the encoder exports. No pickle, no
configuration object of training, no download: `load_model` needs the directory alone, and the
module closes over relative imports, since it is shipped inside MLflow models under another name.
N: pictures, C: classes, D: features, B: batch, h w: spatial.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .encoders import Encoder, load_encoder
from .errors import InputError
from .heads import HEADS, build_head
from .pictures import decode_square, default_threads, open_picture
from .pooling import num_head_features, pooled_features

FORMAT_VERSION = 1
MANIFEST_FILE = "model.json"
HEAD_FILE = "head.safetensors"


class Classifier:
    """A loaded model. Made by `load_model`; safe to call from several threads."""

    def __init__(
        self,
        *,
        encoder: Encoder,
        head: nn.Module,
        class_names: Sequence[str],
        pooling: str,
        blocks: int,
        feature_mean_D: Tensor | None,
        feature_std_D: Tensor | None,
        calibration: tuple[float, float],
        thresholds: Sequence[float] | None,
        input_size: int,
        metadata: Mapping[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.class_names = tuple(class_names)
        self.thresholds = None if thresholds is None else tuple(thresholds)
        """Probability from which a class counts as predicted, one a class; None: not tuned."""
        self.input_size = input_size
        self.metadata = dict(metadata)
        self._encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
        self._head = head.to(device).eval()
        self._pooling = pooling
        self._blocks = blocks
        self._mean_D = None if feature_mean_D is None else feature_mean_D.to(device)
        self._std_D = None if feature_std_D is None else feature_std_D.to(device)
        self._scale, self._bias = calibration
        self._device = device

    def predict(
        self, pictures: Sequence[bytes | Path], *, batch_size: int = 32
    ) -> npt.NDArray[np.float32]:
        """Probabilities [N, C] in the order of `class_names`.

        `pictures` are encoded image files (any format that Pillow reads) or their paths. Raises
        InputError naming the row, counted from 0, of a picture that cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size >= 1 must hold, but got {batch_size=}")
        parts = [np.empty((0, len(self.class_names)), np.float32)]
        with ThreadPoolExecutor(default_threads()) as threads:
            for start in range(0, len(pictures), batch_size):
                batch = pictures[start : start + batch_size]
                rows = range(start, start + len(batch))
                images_B = list(threads.map(self._decode, rows, batch))
                parts.append(self.predict_images(np.stack(images_B)))
        return np.concatenate(parts)

    def predict_images(self, images_B: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities [B, C] of decoded pictures [B, size, size, 3] of the model's input size."""
        with torch.inference_mode():
            images = torch.from_numpy(images_B).to(self._device).permute(0, 3, 1, 2)
            features = self._features(images.float().div(255))
            logits_BC = self._head(features) * self._scale + self._bias
            if not bool(torch.isfinite(logits_BC).all()):
                raise RuntimeError("the model gave a score that is not a finite number")
            probabilities: npt.NDArray[np.float32] = torch.sigmoid(logits_BC).cpu().numpy()
        return probabilities

    def _decode(self, row: int, picture: bytes | Path) -> npt.NDArray[np.uint8]:
        try:
            image = open_picture(picture)
        except InputError as error:
            raise InputError(error.problem, where=f"row {row}", hint=error.hint) from error
        return decode_square(image, self.input_size, resize=self._encoder.backbone.resize)

    def _features(self, images_B3hw: Tensor) -> Tensor:
        """What the head reads: the map [B, D, h, w], or pooled [B, D]; standardised."""
        spatial = bool(getattr(self._head, "spatial", False))
        if spatial:
            features: Tensor = self._encoder(images_B3hw)
        else:
            features = pooled_features(
                self._encoder, images_B3hw, pooling=self._pooling, blocks=self._blocks
            )
        features = features.to(self._device)
        if self._mean_D is None or self._std_D is None:
            return features
        shape = (-1, 1, 1) if spatial else (-1,)
        return (features - self._mean_D.view(shape)) / self._std_D.view(shape)


def save_model(
    folder: Path,
    *,
    encoder: Encoder,
    head: nn.Module,
    head_spec: Mapping[str, Any],
    class_names: Sequence[str],
    pooling: str,
    blocks: int = 1,
    feature_mean_D: Tensor | None = None,
    feature_std_D: Tensor | None = None,
    calibration: tuple[float, float] = (1.0, 0.0),
    thresholds: Sequence[float] | None = None,
    input_size: int,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory, whole or not at all; an earlier model in `folder` is replaced.

    `head_spec` is `{"kind": ..., **settings}` as `build_head` takes them. `pooling` and `blocks`
    are as for `pooled_features`; a spatial head reads neither. The head sees
    (features - mean) / std where both are given. A probability is sigmoid(scale * logit + bias)
    with `calibration` = (scale, bias). `metadata` is any JSON and comes back from `load_model`.
    Raises ValueError for parts that do not fit together, InputError if `folder` holds other files.
    """
    _check_parts(class_names, feature_mean_D, feature_std_D, calibration, thresholds)
    if folder.exists() and not (folder / MANIFEST_FILE).is_file() and any(folder.iterdir()):
        raise InputError("holds other files", where=str(folder), hint="name an empty folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    if feature_mean_D is not None and feature_std_D is not None:
        tensors |= {"feature_mean": feature_mean_D, "feature_std": feature_std_D}
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, part / HEAD_FILE
    )
    encoder_spec = encoder.export(part)
    manifest = {
        "format": "poster-tuner model",
        "format_version": FORMAT_VERSION,
        "class_names": list(class_names),
        "thresholds": None if thresholds is None else [float(t) for t in thresholds],
        "calibration": [float(value) for value in calibration],
        "pooling": pooling,
        "blocks": blocks,
        "input_size": input_size,
        "encoder": encoder_spec,
        "head": dict(head_spec),
        "metadata": dict(metadata or {}),
        "files": {path.name: _sha256(path) for path in sorted(part.iterdir())},
    }
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    (part / MANIFEST_FILE).write_text(text, encoding="utf-8")
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def load_model(folder: Path, *, device: str | torch.device = "cpu") -> Classifier:
    """The classifier saved in `folder`, ready to predict on `device`.

    Raises InputError naming the file that is missing, damaged or of an unknown format.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    encoder = load_encoder(folder, manifest["encoder"])
    settings = dict(manifest["head"])
    kind = settings.pop("kind")
    pooling, blocks = manifest["pooling"], manifest.get("blocks", 1)  # absent: an older model
    head = build_head(
        kind,
        num_features=num_head_features(
            encoder,
            spatial=kind in HEADS and HEADS[kind].spatial,
            pooling=pooling,
            blocks=blocks,
        ),
        num_classes=len(manifest["class_names"]),
        **settings,
    )
    try:
        tensors = load_file(folder / HEAD_FILE)
        prefix = "head."
        head.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"does not fit: {error}", where=str(folder / HEAD_FILE)) from error
    scale, bias = manifest["calibration"]
    return Classifier(
        encoder=encoder,
        head=head,
        class_names=manifest["class_names"],
        pooling=pooling,
        blocks=blocks,
        feature_mean_D=tensors.get("feature_mean"),
        feature_std_D=tensors.get("feature_std"),
        calibration=(scale, bias),
        thresholds=manifest["thresholds"],
        input_size=manifest["input_size"],
        metadata=manifest["metadata"],
        device=device,
    )


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
    if version != FORMAT_VERSION:
        raise InputError(
            f"format_version is {version!r}, and this code reads {FORMAT_VERSION}",
            where=str(path),
            hint="load the model with the version of poster-tuner that saved it",
        )
    keys = "class_names thresholds calibration pooling input_size encoder head metadata files"
    missing = [key for key in keys.split() if key not in manifest]
    if missing:
        raise InputError(f"is damaged: {', '.join(missing)} missing", where=str(path))
    return dict(manifest)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises InputError naming the first file that is missing or not as it was saved."""
    for name, checksum in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError("is missing from the saved model", where=str(path))
        if _sha256(path) != checksum:
            raise InputError(
                "is damaged: its checksum is not the one in model.json",
                where=str(path),
                hint="save or download the model again",
            )


def _check_parts(
    class_names: Sequence[str],
    feature_mean_D: Tensor | None,
    feature_std_D: Tensor | None,
    calibration: tuple[float, float],
    thresholds: Sequence[float] | None,
) -> None:
    if len(set(class_names)) != len(class_names) or not class_names:
        raise ValueError(f"class names must be distinct and not none, but got {class_names!r}")
    if (feature_mean_D is None) != (feature_std_D is None):
        raise ValueError("feature_mean_D and feature_std_D go together")
    if feature_std_D is not None and not bool((feature_std_D > 0).all()):
        raise ValueError("every feature_std_D > 0 must hold")
    scale, bias = calibration
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(bias)):
        raise ValueError(f"scale > 0 must hold and both be finite, but got {calibration=}")
    if thresholds is not None and len(thresholds) != len(class_names):
        raise ValueError(f"one threshold a class: {len(thresholds)=}, {len(class_names)=}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
