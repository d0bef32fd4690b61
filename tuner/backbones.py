"""The backbones of a study, built once before it starts, and what their weights are.

What is missing or does not fit is said at once. A fingerprint of each backbone's weights goes into
the study's record: another driver of it, whose weight files bear the same names, must have the
same weights, or its trials would be compared with those of other features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from core.encoding.encoders import Encoder, build_encoder, weights_fingerprint
from core.encoding.onnx_network import find_onnx
from core.encoding.weights import find_weights
from core.errors import InputError
from core.finetuning.drop_path import set_drop_path

from .spaces.space import SearchSpace
from .studies.plan import feature_requests


def check_backbones(
    space: SearchSpace, *, weights: str, weights_dir: Path | None
) -> dict[str, str]:
    """The fingerprint of each backbone's weights, by its label.

    Raises InputError for weights that are not at hand or do not fit, and for stochastic depth
    where there is nothing to skip.
    """
    with_drop_path = {name for part in space.parts for name in _with_drop_path(part)}
    found = {}
    for label, encoder in _encoders(space, weights=weights, weights_dir=weights_dir):
        found[label] = weights_fingerprint(encoder)
        name = encoder.backbone.name
        if name in with_drop_path and not set_drop_path(encoder.network, 0.1):
            raise InputError(
                f"{name} has no blocks that can be skipped, so it has no drop_path",
                where=f"space {space.name}, drop_path",
                hint="add `when: {backbone: ...}` with backbones built for it, such as "
                "convnext_tiny",
            )
    return found


def check_same_weights(
    space: SearchSpace,
    fingerprints: Mapping[str, str],
    *,
    weights: str,
    weights_dir: Path | None,
) -> None:
    """Raises InputError, naming the file, if a backbone has other weights here than where the
    study began. `fingerprints`: of `check_backbones` there."""
    for label, encoder in _encoders(space, weights=weights, weights_dir=weights_dir):
        wanted = fingerprints.get(label)
        if wanted is None or weights_fingerprint(encoder) == wanted:
            continue
        raise InputError(
            f"these are not the weights of {label} that the study began with",
            where=_source(encoder.backbone.name, weights, weights_dir),
            hint="copy the file from there; if it lies elsewhere here: --weights DIR",
        )


def _encoders(
    space: SearchSpace, *, weights: str, weights_dir: Path | None
) -> Iterator[tuple[str, Encoder]]:
    """Every backbone of a space at every picture size, one at a time in memory, with a label."""
    for backbone, size in sorted(
        {(r.backbone, r.image_size) for part in space.parts for r in feature_requests(part)}
    ):
        encoder = build_encoder(
            backbone, weights=weights, weights_dir=weights_dir, input_size=size or None
        )
        yield (f"{backbone} at {size} px" if size else backbone), encoder


def _source(backbone: str, weights: str, weights_dir: Path | None) -> str:
    """For people: where a backbone's weights come from."""
    if backbone.startswith("onnx/"):
        return str(find_onnx(backbone, weights_dir))
    if weights == "none":
        return f"--weights none (this version of torch draws others for {backbone})"
    path = find_weights(backbone, weights_dir)
    return f"the library's own weights of {backbone}" if path is None else str(path)


def _with_drop_path(space: SearchSpace) -> set[str]:
    """Backbones that some trial of the space has with a drop path above 0."""
    if "drop_path" not in space.parameters:
        return set()
    parameter = space.parameters["drop_path"]
    found = set()
    for values in space.assignments(["backbone", *parameter.parents()]):
        branch = parameter.active(values)
        if branch is not None and any(branch.domain.extremes()):
            found.add(str(values["backbone"]))
    return found
