"""Whether a search space can be searched: its conditions hold together, its names exist.

Each refusal points at the file, the line and the key to mend. Whether every trial can run is
checked in `space_corners`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from core.errors import InputError

from ..sampling.pruners import build_pruner
from ..sampling.samplers import build_sampler
from .corners import branch_path, check_corners
from .domain import Branch, Constant, Parameter, Value, plain
from .source import Source
from .space import SearchSpace

FINETUNE_ONLY = (
    "unfrozen_stages",
    "unfreeze_epochs",
    "layer_lr_decay",
    "head_lr_multiplier",
    "head_start",
    "accumulation_steps",
    "clip_norm",
    "ema_decay",
    "batch_norm",
    "drop_path",
    "horizontal_flip",
    "min_crop_scale",
    "randaugment_magnitude",
    "randaugment_ops",
    "mixup_alpha",
    "cutmix_alpha",
)
"""Settings that a probe does not read: searching them would be searching noise."""
PROBE_ONLY = ("views",)
"""Settings that fine-tuning does not read: it sees pictures, not cached features."""


def in_order(parameters: Mapping[str, Parameter], source: Source) -> dict[str, Parameter]:
    """`parameters` so that each comes after those that its conditions read; else as in the file.

    Raises InputError for conditions on unknown parameters, and for conditions in a circle.
    """
    for parameter in parameters.values():
        for parent in parameter.parents():
            if parent not in parameters:
                raise source.error(
                    f"a condition on {parent}, which the space does not have",
                    *_when_path(parameter, parent),
                    hint=f"add {parent} to the parameters, or take the condition out; "
                    f"there are: {', '.join(sorted(parameters))}",
                )
    ordered: dict[str, Parameter] = {}

    def place(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circle = " -> ".join((*trail[trail.index(name) :], name))
            raise source.error(
                f"conditions go in a circle: {circle}",
                "parameters",
                name,
                hint="let one of them exist without a condition",
            )
        if name in ordered:
            return
        for parent in parameters[name].parents():
            place(parent, (*trail, name))
        ordered[name] = parameters[name]

    for name in parameters:
        place(name, ())
    return ordered


def check_space(space: SearchSpace, source: Source, *, after_probes: bool = False) -> None:
    """Raises InputError, with file, line and key, for the first thing that cannot be searched.

    `after_probes`: fine-tuning that a probe part comes before.
    """
    for parameter in space.parameters.values():
        _check_conditions(space, parameter, source)
    _check_scope(space, source)
    if not after_probes:
        _check_head_start(space, source)
    _check_backbones(space, source)
    check_corners(space, source)
    builders: dict[str, Callable[[], object]] = {
        "sampler": lambda: build_sampler(space.sampler, space, 0),
        "pruner": lambda: build_pruner(space.pruner, space.max_epochs, minimised=space.minimised),
    }
    for what, build in builders.items():
        try:
            build()
        except InputError as error:
            raise source.error(error.problem, what, hint=error.hint) from error
    for index, point in enumerate(space.points):
        try:
            space.to_params(point)
        except InputError as error:
            key = (error.where,) if error.where else ()
            raise source.error(error.problem, "points", index, *key, hint=error.hint) from error


def _check_conditions(space: SearchSpace, parameter: Parameter, source: Source) -> None:
    """Each condition names values that its parameter takes, and no branch hides a later one."""
    for index, branch in enumerate(parameter.branches):
        for parent, wanted in branch.when.items():
            path = (*branch_path(parameter, index), "when", parent)
            taken = _values_of(space.parameters[parent])
            if taken is None:
                raise source.error(
                    f"{parent} is a real range, so that it hardly ever takes one given value",
                    *path,
                    hint=f"give {parent} choices or a step",
                )
            for value in wanted:
                if value not in taken:
                    shown = ", ".join(str(plain(v)) for v in taken[:20])
                    raise source.error(
                        f"{parent} never takes the value {plain(value)!r}",
                        *path,
                        hint=f"it takes: {shown}",
                    )
        for earlier in parameter.branches[:index]:
            if _covers(earlier, branch):
                raise source.error(
                    "an earlier branch holds wherever this one does",
                    *branch_path(parameter, index),
                    hint="the first that holds is taken: put the narrower condition first",
                )


def _check_scope(space: SearchSpace, source: Source) -> None:
    if "backbone" not in space.parameters:
        raise source.error("backbone is missing", "parameters", hint="for example `backbone: ffn`")
    seed = space.parameters.get("seed")
    if seed and not all(isinstance(b.domain, Constant) for b in seed.branches):
        raise source.error(
            "seed must not be searched: a lucky seed is not a better model",
            "parameters",
            "seed",
            hint="give one number, or leave it out",
        )
    probing = space.mode == "probe"
    for name in FINETUNE_ONLY if probing else PROBE_ONLY:
        if name in space.parameters:
            reader = "a probe, which trains the head alone" if probing else "fine-tuning"
            raise source.error(
                f"{name} is not read by {reader}",
                "parameters",
                name,
                hint=_where_read(probing, in_part=bool(source.part)),
            )


def _where_read(probing: bool, *, in_part: bool) -> str:
    """What to do about a setting that the mode does not read."""
    if not probing:
        return "leave it out; horizontal_flip and min_crop_scale are there"
    if in_part:
        return "leave it out, or move it to the `finetune` part"
    return "leave it out, or write `mode: finetune` at the top"


def _check_head_start(space: SearchSpace, source: Source) -> None:
    """A head starts from a probe only where probes were searched before."""
    parameter = space.parameters.get("head_start")
    for index, branch in enumerate(parameter.branches if parameter else ()):
        if "probe" in (branch.domain.values() or ()):
            assert parameter is not None
            raise source.error(
                "there are no probes that a head could start from",
                *branch_path(parameter, index),
                hint="leave it out, or write a space with a `probe` and a `finetune` part",
            )


def _check_backbones(space: SearchSpace, source: Source) -> None:
    from core.encoding.backbones import find_backbone

    parameter = space.parameters["backbone"]
    for name in _values_of(parameter) or []:
        if str(name).startswith("onnx/"):
            if space.mode == "finetune":
                raise source.error(f"{name} can only be probed", "parameters", "backbone")
            continue  # Whether the file is there is known when the weights folder is.
        try:
            find_backbone(str(name))
        except InputError as error:
            raise source.error(error.problem, "parameters", "backbone", hint=error.hint) from error


def _values_of(parameter: Parameter) -> Sequence[Value] | None:
    """All values over all branches, or None if some branch has endlessly many."""
    if len(parameter.branches) == 1:
        return parameter.branches[0].domain.values()
    found: list[Value] = []
    for branch in parameter.branches:
        values = branch.domain.values()
        if values is None:
            return None
        found += values
    return found


def _covers(earlier: Branch, later: Branch) -> bool:
    return all(
        name in later.when and set(later.when[name]) <= set(valid)
        for name, valid in earlier.when.items()
    )


def _when_path(parameter: Parameter, parent: str) -> tuple[str | int, ...]:
    index = next(i for i, b in enumerate(parameter.branches) if parent in b.when)
    return (*branch_path(parameter, index), "when", parent)
