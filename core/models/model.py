"""A saved classifier in one directory: written by `save_model` or `save_ensemble`, and loaded.

The directory holds `model.json` (what the model is, with a checksum of every other file),
`head.safetensors` (head and feature statistics) and what the encoder exports. An ensemble's has a
folder for each encoder and one for each member's head instead: members that share a backbone name
the same encoder. No pickle, no configuration object of training, no download: `load_model` needs
the directory alone. This file travels in MLflow models, so its imports are relative.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..encoding.encoders import Encoder, load_encoder, weights_fingerprint
from ..encoding.pooling import num_head_features
from ..errors import InputError
from ..heads import HEADS, build_head
from .manifest import (
    ENSEMBLE_VERSION,
    FORMAT_VERSION,
    MANIFEST_FILE,
    check_files,
    read_manifest,
    write_manifest,
)
from .served import Classifier, Member

HEAD_FILE = "head.safetensors"


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
    member = Member(
        encoder=encoder,
        head=head,
        head_spec=head_spec,
        pooling=pooling,
        blocks=blocks,
        feature_mean_D=feature_mean_D,
        feature_std_D=feature_std_D,
    )
    _check_parts(class_names, calibration, thresholds)
    _check_member(member)
    with _replacing(folder) as part:
        _save_head(member, part)
        encoder_spec = encoder.export(part)
        write_manifest(
            part,
            format_version=FORMAT_VERSION,
            class_names=class_names,
            thresholds=thresholds,
            calibration=calibration,
            metadata=metadata,
            pooling=pooling,
            blocks=blocks,
            input_size=input_size,
            encoder=encoder_spec,
            head=dict(head_spec),
        )


def save_ensemble(
    folder: Path,
    *,
    members: Sequence[Member],
    class_names: Sequence[str],
    calibration: tuple[float, float] = (1.0, 0.0),
    thresholds: Sequence[float] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """As `save_model`, for a model whose probability is the weighted mean of its members'.

    Equal encoders (weights and everything else) are written once and run once. A probability is
    sigmoid(scale * logit + bias) with `calibration`, of the logit of the members' mean.
    """
    _check_parts(class_names, calibration, thresholds)
    for member in members:
        _check_member(member)
    total = sum(member.weight for member in members)
    if not members or min(m.weight for m in members) <= 0 or not math.isclose(total, 1.0):
        raise ValueError(
            f"weights > 0 that sum to 1 must hold, but got {[m.weight for m in members]}"
        )
    encoders: dict[tuple[str, str], int] = {}
    encoder_specs: list[dict[str, Any]] = []
    member_specs: list[dict[str, Any]] = []
    with _replacing(folder) as part:
        for number, member in enumerate(members):
            encoder = member.encoder
            # The record of a backbone prints all that it is; size and resizing are in it.
            key = (repr(encoder.backbone), weights_fingerprint(encoder))
            if key not in encoders:
                encoders[key] = len(encoder_specs)
                name = f"encoder-{encoders[key]}"
                (part / name).mkdir()
                encoder_specs.append({"folder": name, **encoder.export(part / name)})
            name = f"member-{number}"
            (part / name).mkdir()
            _save_head(member, part / name)
            member_specs.append(
                {
                    "folder": name,
                    "encoder": encoders[key],
                    "weight": member.weight,
                    "calibration": [float(value) for value in member.calibration],
                    "pooling": member.pooling,
                    "blocks": member.blocks,
                    "head": dict(member.head_spec),
                }
            )
        write_manifest(
            part,
            format_version=ENSEMBLE_VERSION,
            class_names=class_names,
            thresholds=thresholds,
            calibration=calibration,
            metadata=metadata,
            input_size=max(m.encoder.backbone.input_size for m in members),
            encoders=encoder_specs,
            members=member_specs,
        )


def load_model(folder: Path, *, device: str | torch.device = "cpu") -> Classifier:
    """The classifier saved in `folder`, ready to predict on `device`.

    Raises InputError naming the file that is missing, damaged or of an unknown format.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    num_classes = len(manifest["class_names"])
    if manifest["format_version"] == FORMAT_VERSION:
        encoder = load_encoder(folder, manifest["encoder"])
        members = [_load_member(folder, encoder, manifest, num_classes)]
    else:
        encoders = [load_encoder(folder / spec["folder"], spec) for spec in manifest["encoders"]]
        members = [
            _load_member(folder / spec["folder"], encoders[spec["encoder"]], spec, num_classes)
            for spec in manifest["members"]
        ]
    scale, bias = manifest["calibration"]
    return Classifier(
        members=members,
        class_names=manifest["class_names"],
        calibration=(scale, bias),
        thresholds=manifest["thresholds"],
        metadata=manifest["metadata"],
        device=device,
    )


def _load_member(
    folder: Path, encoder: Encoder, spec: Mapping[str, Any], num_classes: int
) -> Member:
    """`spec` is a member's entry in the manifest, or the manifest of a model of one."""
    settings = dict(spec["head"])
    kind = settings.pop("kind")
    pooling, blocks = spec["pooling"], spec.get("blocks", 1)  # absent: an older model
    head = build_head(
        kind,
        num_features=num_head_features(
            encoder,
            spatial=kind in HEADS and HEADS[kind].spatial,
            pooling=pooling,
            blocks=blocks,
        ),
        num_classes=num_classes,
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
    # A model of one has its calibration from the classifier alone.
    scale, bias = spec["calibration"] if "weight" in spec else (1.0, 0.0)
    return Member(
        encoder=encoder,
        head=head,
        head_spec=dict(spec["head"]),
        pooling=pooling,
        blocks=blocks,
        feature_mean_D=tensors.get("feature_mean"),
        feature_std_D=tensors.get("feature_std"),
        calibration=(scale, bias),
        weight=spec.get("weight", 1.0),
    )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write a model into; it takes the place of `folder` when the block ends well."""
    if folder.exists() and not (folder / MANIFEST_FILE).is_file() and any(folder.iterdir()):
        raise InputError("holds other files", where=str(folder), hint="name an empty folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    for path in part.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def _save_head(member: Member, folder: Path) -> None:
    tensors: dict[str, Tensor] = {f"head.{k}": v for k, v in member.head.state_dict().items()}
    if member.feature_mean_D is not None and member.feature_std_D is not None:
        tensors |= {"feature_mean": member.feature_mean_D, "feature_std": member.feature_std_D}
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, folder / HEAD_FILE
    )


def _check_member(member: Member) -> None:
    mean_D, std_D = member.feature_mean_D, member.feature_std_D
    if (mean_D is None) != (std_D is None):
        raise ValueError("feature_mean_D and feature_std_D go together")
    if std_D is not None and not bool((std_D > 0).all()):
        raise ValueError("every feature_std_D > 0 must hold")


def _check_parts(
    class_names: Sequence[str],
    calibration: tuple[float, float],
    thresholds: Sequence[float] | None,
) -> None:
    if len(set(class_names)) != len(class_names) or not class_names:
        raise ValueError(f"class names must be distinct and not none, but got {class_names!r}")
    scale, bias = calibration
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(bias)):
        raise ValueError(f"scale > 0 must hold and both be finite, but got {calibration=}")
    if thresholds is not None and len(thresholds) != len(class_names):
        raise ValueError(f"one threshold a class: {len(thresholds)=}, {len(class_names)=}")
