"""What a model costs where it is used: the time for one picture, and its size.

Both follow from its shape (backbone, picture size, head, pooling) and not from how it was trained,
so each shape is measured once a study, by one worker, before the first trial: the median of warm
runs on single pictures, from file bytes to probabilities, as a served model predicts. The numbers
are kept with the Optuna study, so that every session and every driver of it judges by the same.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.errors import InputError

if TYPE_CHECKING:
    import optuna
    import torch
    from rich.console import Console

    from core.encoding.encoders import Encoder
    from core.models.served import Classifier, Member

    from ..spaces.space import SearchSpace
    from ..trials.cluster import Workers
    from ..trials.context import Context

COSTS: dict[str, str] = {"latency_ms": "ms", "size_mb": "MB"}
"""What can be minimised or bounded, with its unit."""
ATTRIBUTE = "costs"
"""Optuna user attribute of a study (measured shapes), and of a trial (its own costs)."""
SETTINGS = ("backbone", "image_size", "head", "hidden_sizes", "pooling", "blocks")
"""What decides a model's cost."""
PASSES = 3
"""Over all shapes of a backbone, so that a moment's disturbance does not hit one of them alone."""
WARM_RUNS, TIMED_RUNS = 1, 5
"""In each pass."""
PASS_SECONDS = 1.0
"""Slow models are timed less often in a pass, though at least twice."""
NUM_PICTURES = 5

Costs = Mapping[str, float]
"""Name of a cost -> its value."""


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """What models must share to cost the same."""

    backbone: str
    image_size: int
    """0: the backbone's own."""
    head: str
    hidden_sizes: tuple[int, ...]
    pooling: str
    """Empty for a spatial head, which reads neither this nor blocks."""
    blocks: int


def shape_of(config: TrialConfig) -> Shape:
    """The shape of a trial's model."""
    return shape_of_values({name: getattr(config, name) for name in SETTINGS})


def shapes_of(space: SearchSpace) -> list[Shape]:
    """Every shape that a trial of the space can have, sorted."""
    return sorted({shape_of_values(values) for values in space.assignments(SETTINGS)})


def shape_of_values(values: Mapping[str, Any]) -> Shape:
    """The shape of a model with these values of SETTINGS; others have their defaults."""
    from core.heads import HEADS

    defaults = {name: getattr(TrialConfig, name, None) for name in SETTINGS}
    settings = {**defaults, **{k: v for k, v in values.items() if k in SETTINGS}}
    if HEADS[settings["head"]].spatial:
        settings |= {"pooling": "", "blocks": 1}
    settings["image_size"] = settings["image_size"] or 0
    return Shape(**{**settings, "hidden_sizes": tuple(settings["hidden_sizes"])})


def measured_costs(
    study: optuna.Study,
    shapes: Sequence[Shape],
    context: Context,
    workers: Workers,
    console: Console,
) -> dict[Shape, Costs]:
    """The costs of each shape: those that the study knows, and the rest measured now by one
    worker. Raises InputError for a backbone that cannot be built."""
    known = read_costs(study)
    missing = [shape for shape in shapes if shape not in known]
    if missing:
        import ray

        what = f"measuring latency and size of {len(missing)} kinds of models"
        with console.status(what):
            task: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(measure)
            found = ray.get(task.remote(context, missing))
        if isinstance(found, InputError):
            raise found
        known |= dict(zip(missing, found, strict=True))
        keep_costs(study, known)
    return {shape: known[shape] for shape in shapes}


def unmeasured(study: optuna.Study, space: SearchSpace) -> list[Shape]:
    """The shapes of a space whose costs count and are not known to the study."""
    if not space.costs:
        return []
    known = read_costs(study)
    return [shape for shape in shapes_of(space) if shape not in known]


def share_costs(earlier: optuna.Study, study: optuna.Study, space: SearchSpace) -> None:
    """Let a study know what an earlier one measured of the shapes that both have."""
    found, missing = read_costs(earlier), unmeasured(study, space)
    shared = {shape: found[shape] for shape in missing if shape in found}
    if shared:
        keep_costs(study, read_costs(study) | shared)


def read_costs(study: optuna.Study) -> dict[Shape, Costs]:
    """What the study knows."""
    rows = study.user_attrs.get(ATTRIBUTE, [])
    return {shape_of_values(row["shape"]): {name: row[name] for name in COSTS} for row in rows}


def keep_costs(study: optuna.Study, costs: Mapping[Shape, Costs]) -> None:
    """Write what the study is to know."""
    rows = [{"shape": dataclasses.asdict(shape), **own} for shape, own in sorted(costs.items())]
    study.set_user_attr(ATTRIBUTE, rows)


# ---- on a worker ------------------------------------------------------------------------------


def measure(context: Context, shapes: Sequence[Shape]) -> list[Costs] | InputError:
    """The costs of each shape, on this process' device and with its threads."""
    from ..trials.context import prepare_worker

    device = prepare_worker(context)
    pictures = [context.table.paths[row].read_bytes() for row in context.split.train[:NUM_PICTURES]]
    by_encoder: dict[tuple[str, int], list[Shape]] = defaultdict(list)
    for shape in shapes:
        by_encoder[shape.backbone, shape.image_size].append(shape)
    found: dict[Shape, Costs] = {}
    try:
        for members in by_encoder.values():
            found |= _measure_together(context, members, pictures, device)
    except InputError as error:
        return error  # Raised, Ray would wrap it in a traceback.
    return [found[shape] for shape in shapes]


def _measure_together(
    context: Context, shapes: Sequence[Shape], pictures: Sequence[bytes], device: torch.device
) -> dict[Shape, Costs]:
    """Models that share an encoder, in turn."""
    from core.models.served import Classifier

    from ..trials.context import FeatureRequest, build_backbone

    first = shapes[0]
    request = FeatureRequest(
        backbone=first.backbone, image_size=first.image_size, pooling=first.pooling
    )
    encoder = build_backbone(context, request)
    members = {shape: _member(encoder, shape, context.table.num_classes) for shape in shapes}
    models = {
        shape: Classifier(
            members=[member],
            class_names=context.table.class_names,
            calibration=(1.0, 0.0),
            thresholds=None,
            metadata={},
            device=device,
        )
        for shape, member in members.items()
    }
    times: dict[Shape, list[float]] = defaultdict(list)
    for _ in range(PASSES):
        for shape, model in models.items():
            times[shape] += _pass(model, pictures)
    return {
        shape: {
            "latency_ms": round(1000 * statistics.median(times[shape]), 3),
            "size_mb": round(num_bytes(members[shape]) / 1e6, 3),
        }
        for shape in shapes
    }


def _pass(model: Classifier, pictures: Sequence[bytes]) -> list[float]:
    """Seconds of each timed run on one picture."""
    for picture in pictures[:WARM_RUNS]:
        model.predict([picture])
    seconds: list[float] = []
    while len(seconds) < TIMED_RUNS and (sum(seconds) < PASS_SECONDS or len(seconds) < 2):
        picture = pictures[len(seconds) % len(pictures)]
        started = time.perf_counter()
        model.predict([picture])
        seconds.append(time.perf_counter() - started)
    return seconds


def _member(encoder: Encoder, shape: Shape, num_classes: int) -> Member:
    """A model of this shape with a head of random weights."""
    import torch

    from core.encoding.pooling import num_head_features
    from core.heads import HEADS, build_head
    from core.models.served import Member

    spatial = HEADS[shape.head].spatial
    encoder.check_blocks(shape.blocks)
    num_features = num_head_features(
        encoder, spatial=spatial, pooling=shape.pooling, blocks=shape.blocks
    )
    head = build_head(
        shape.head,
        num_features=num_features,
        num_classes=num_classes,
        seed=0,
        hidden_sizes=shape.hidden_sizes,
    )
    return Member(
        encoder=encoder,
        head=head,
        pooling=shape.pooling,
        blocks=shape.blocks,
        feature_mean_D=torch.zeros(num_features),
        feature_std_D=torch.ones(num_features),
    )


def num_bytes(member: Member) -> int:
    """What the weights of a saved model take: but for some kilobytes of description, all of it."""
    from core.encoding.onnx_network import OnnxNetwork

    network = member.encoder.network
    tensors = [*member.head.state_dict().values(), member.feature_mean_D, member.feature_std_D]
    total = sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)
    if isinstance(network, OnnxNetwork):
        return total + len(network.model_bytes)
    return total + sum(int(tensor.nbytes) for tensor in network.state_dict().values())
