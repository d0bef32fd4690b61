"""What a study is going to need, read off its space before anything runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from core.config import TrialConfig
from core.errors import InputError

from ..sampling.pruners import build_pruner, rungs
from ..spaces.domain import Value
from ..spaces.space import SearchSpace
from ..trials.context import FeatureRequest, feature_request, view_requests

READ_BY_FEATURES = ("backbone", "head", "pooling", "blocks", "views", "image_size")
"""Parameters that decide which features a trial reads."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study's budget and needs."""

    trials: int
    """Trials in all; fewer if the space holds fewer configurations."""
    deadline: float | None
    """`time.time()` after which no cohort is started."""
    requests: tuple[FeatureRequest, ...]
    """Features that some trial may read, sorted."""
    rungs: tuple[int, ...]
    """Epochs after which trials may be stopped."""
    seconds: float | None = None
    """From now to the deadline, for a quote."""
    device_seconds: float | None = None
    """Device seconds of the whole study, from its first session on, after which no cohort is
    started; see `tuner.budgets.device_time`."""


def make_plan(
    space: SearchSpace,
    *,
    trials: int | None,
    hours: float | None,
    device_hours: float | None = None,
) -> Plan:
    """The plan of a study. `trials` and `hours` override the space's budget.

    Raises InputError for a budget that is not positive or a pruner that does not fit.
    """
    if trials is not None and trials < 1:
        raise InputError(f"at least one trial is needed, but got {trials}", where="--trials")
    if hours is not None and not hours > 0:
        raise InputError(f"the time must be positive, but got {hours}", where="--hours")
    if device_hours is not None and not device_hours > 0:
        raise InputError(
            f"the time must be positive, but got {device_hours}", where="--device-hours"
        )
    size = space.size()
    exhaustive = space.sampler.name in ("grid", "brute_force")
    wanted = trials or space.trials
    build_pruner(space.pruner, space.max_epochs, minimised=space.minimised)
    return Plan(
        trials=min(wanted, size) if exhaustive and size is not None else wanted,
        deadline=None if hours is None else time.time() + hours * 3600,
        requests=tuple(feature_requests(space)),
        rungs=rungs(space.pruner, space.max_epochs),
        seconds=None if hours is None else hours * 3600,
        device_seconds=None if device_hours is None else device_hours * 3600,
    )


def feature_requests(space: SearchSpace) -> list[FeatureRequest]:
    """Everything that some trial of the space may read, sorted, each once."""
    found = {r for v in space.assignments(READ_BY_FEATURES) for r in requests_of(space, v)}
    return sorted(found)


def requests_of(space: SearchSpace, values: Mapping[str, Value]) -> list[FeatureRequest]:
    """What trials of the space with these values of READ_BY_FEATURES read."""
    plain = feature_request(
        mode=space.mode,
        backbone=str(values["backbone"]),
        head=str(values.get("head", TrialConfig.head)),
        pooling=str(values.get("pooling", TrialConfig.pooling)),
        blocks=int(str(values.get("blocks", TrialConfig.blocks))),
        image_size=int(str(values.get("image_size") or 0)),
    )
    return view_requests(plain, str(values.get("views", TrialConfig.views)))
