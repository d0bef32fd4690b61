"""From the best probes of a two-part study to the first trials of its fine-tuning part.

A probe's settings are taken as far as the fine-tuning space can express them; the sampler chooses
the rest. A probe's learning rate is its head's: in fine-tuning that is `lr` times
`head_lr_multiplier`, so the two are chosen with the probe's rate as their product; where heads go
on from the probes' weights, it is left out, as it would undo them. A probe whose backbone the
fine-tuning space lacks seeds nothing; rate and decay of another optimizer are left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.config import TrialConfig
from core.report import Status

from ..spaces.check import FINETUNE_ONLY, PROBE_ONLY
from ..spaces.corners import is_read
from ..spaces.domain import Constant, Domain, Range
from ..spaces.space import SearchSpace
from .study import TrialRecord

NOT_SEEDED = {"mode", "seed", *FINETUNE_ONLY, *PROBE_ONLY}
"""What a probe says nothing about."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A probe, and the fine-tuning trial that starts from it."""

    number: int
    """Of the probe in its study."""
    value: float
    """Its best validation objective."""
    point: dict[str, Any]
    """What is fixed of the fine-tuning trial."""
    used: tuple[str, ...]
    """The probe's own settings that the point holds."""
    left_out: tuple[str, ...]
    """Those that it does not."""


def choose_seeds(probes: Sequence[TrialRecord], space: SearchSpace) -> list[Seed]:
    """The best complete probes of a two-part space as points of its fine-tuning part, best first,
    no two of them the same point: as many as the space wants, if there are."""
    assert space.finetune is not None
    seeds: list[Seed] = []
    for probe in best_probes(probes):
        if len(seeds) == space.from_probes:
            break
        seed = _seed(probe, space.finetune)
        if "backbone" in seed.point and all(seed.point != other.point for other in seeds):
            seeds.append(seed)
    return seeds


def best_probes(probes: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials by value, best first; of equals, the earlier."""
    complete = [t for t in probes if t.status == Status.COMPLETE and t.value is not None]
    return sorted(complete, key=lambda t: (-(t.value or 0.0), t.number))


def seeds_text(seeds: Sequence[Seed]) -> str:
    """For people: which probes, how much of them is used, what is not and how often."""
    if not seeds:
        return "no probe can be expressed in the fine-tuning space: its first trials are free"
    numbers = ", ".join(str(seed.number) for seed in seeds)
    used = sum(len(seed.used) for seed in seeds)
    left_out = Counter(name for seed in seeds for name in seed.left_out)
    names = ", ".join(f"{name} {times}x" for name, times in left_out.most_common())
    rest = f"{left_out.total()} left out ({names})" if left_out else "none left out"
    return f"fine-tuning starts from probes {numbers}: {used} of their settings used, {rest}"


def _seed(probe: TrialRecord, space: SearchSpace) -> Seed:
    """The probe's settings in the words of the fine-tuning space."""
    whole = TrialConfig.from_dict(probe.settings).to_dict()
    settings = {
        name: value
        for name, value in whole.items()
        if name not in NOT_SEEDED and is_read(name, whole)
    }
    # Rates and decays are worth nothing under another optimizer.
    own = {name: settings.pop(name) for name in _optimizer_settings() if name in settings}
    point, _ = space.fit(settings)
    if _optimizer(point, space) == whole["optimizer"]:
        point = _with_rates(settings | own, space)
    said = [name for name in probe.settings if name not in ("mode", "seed")]
    return Seed(
        number=probe.number,
        value=probe.value or 0.0,
        point=point,
        used=tuple(name for name in said if name in point),
        left_out=tuple(name for name in said if name not in point),
    )


def _optimizer_settings() -> set[str]:
    from core.optimizers import OPTIMIZERS

    read = {name for kind in OPTIMIZERS.values() for name in kind.parameters}
    return {"lr", "weight_decay", *read}


def _optimizer(point: Mapping[str, Any], space: SearchSpace) -> str | None:
    """The optimizer of a point; None where the sampler chooses it, or the space fixes another."""
    if "optimizer" in space.parameters:
        return point.get("optimizer")
    return TrialConfig.optimizer


def _with_rates(settings: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """The point of `settings`, in which `lr` is the head's rate."""
    others = {name: value for name, value in settings.items() if name != "lr"}
    if _heads_are_trained(space):
        return space.fit(others)[0]
    for rates in _rates(settings["lr"], space):
        point, _ = space.fit({**others, **rates})
        if rates.keys() & space.parameters.keys() <= point.keys():
            return point
    return space.fit(others)[0]


def _heads_are_trained(space: SearchSpace) -> bool:
    """Whether every trial's head goes on from a probe's weights."""
    if "head_start" not in space.parameters:
        return False
    domains = [branch.domain for branch in space.parameters["head_start"].branches]
    return all(isinstance(d, Constant) and d.value == "probe" for d in domains)


def _rates(head_rate: float, space: SearchSpace) -> Iterator[dict[str, float]]:
    """Learning rates and head multipliers of the space whose product is `head_rate`: in the middle
    (of the logarithms) of what is possible in each pair of their branches."""
    for low, high in _intervals(space, "lr"):
        for least, most in _intervals(space, "head_lr_multiplier"):
            smallest, largest = max(low, head_rate / most), min(high, head_rate / least)
            if smallest > largest * (1 + 1e-9):
                continue
            rate = min(max(math.sqrt(smallest * largest), low), high)
            yield {"lr": rate, "head_lr_multiplier": min(max(head_rate / rate, least), most)}


def _intervals(space: SearchSpace, name: str) -> list[tuple[float, float]]:
    """Where the values of a numeric parameter lie; its default if the space does not have it."""
    if name not in space.parameters:
        default = getattr(TrialConfig, name)
        return [(default, default)]
    return [
        interval
        for branch in space.parameters[name].branches
        for interval in _intervals_of(branch.domain)
    ]


def _intervals_of(domain: Domain) -> list[tuple[float, float]]:
    if isinstance(domain, Range) and domain.step is None:
        return [(domain.low, domain.high)]
    values = [float(value) for value in domain.values() or () if isinstance(value, (int, float))]
    return [(value, value) for value in values]
