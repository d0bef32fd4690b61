"""From an earlier study's trial to a first point of a new one.

What the new space does not let vary (a constant, or a parameter that it lacks) is as the new space
has it; a trial that has a value which the new space cannot choose, or another backbone, head or
optimizer, does not fit, and the settings to blame are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.config import TrialConfig
from core.errors import InputError

from ..spaces.corners import is_read
from ..spaces.points import fit_settings
from ..spaces.space import SearchSpace
from .seeds import best_probes
from .study import Study, TrialRecord, trial_records

KEPT = ("backbone", "head", "optimizer")
"""Without these of its settings a trial's other settings mean nothing."""


@dataclass(frozen=True, kw_only=True)
class WarmPoint:
    """A first point, and the trial that it comes from."""

    study: str
    number: int
    """Of the trial in its study."""
    value: float
    """Its objective there: for people, nothing is decided by it in the new study."""
    mode: str
    """`probe` or `finetune`: of which part of the new space it is a point."""
    point: dict[str, Any]
    changed: tuple[str, ...]
    """Settings of the trial that are as the new space has them."""


def complete_trials(study: Study) -> list[TrialRecord]:
    """Complete trials, best first. An earlier study is only read, whoever owns it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        found = optuna.load_study(study_name=study.record.name, storage=study.storage())
    except KeyError as error:
        raise InputError(
            "its trials are not in its storage any more", where=f"--from-study {study.record.name}"
        ) from error
    return best_probes(tuple(trial_records(found, study.space())))


def mode_of(trial: TrialRecord) -> str:
    return str(trial.settings.get("mode", TrialConfig.mode))


def warm_point(study: str, trial: TrialRecord, space: SearchSpace) -> WarmPoint | set[str]:
    """A trial as a point of `space`, or the settings because of which it is none.

    Settings that the earlier space left alone had `TrialConfig`'s defaults: they are said, too, as
    far as the new space holds them, so that the same training results where that is possible.
    """
    whole = TrialConfig.from_dict(trial.settings).to_dict()
    settings = {
        name: value
        for name, value in whole.items()
        if name not in ("mode", "seed") and is_read(name, whole)
    }
    fit = fit_settings(settings, mode=space.mode, parameters=space.parameters)
    wrong = {name for name in trial.settings if name in fit.refused}
    # What the space lacks is at its default there.
    changed = [
        name
        for name in settings
        if name in fit.fixed and (name in space.parameters or settings[name] != _default(name))
    ]
    wrong |= {name for name in KEPT if name in changed}
    if wrong:
        return wrong
    return WarmPoint(
        study=study,
        number=trial.number,
        value=trial.value or 0.0,
        mode=space.mode,
        point=fit.point,
        changed=tuple(name for name in trial.settings if name in changed),
    )


def _default(name: str) -> Any:
    """What trials of a space without this parameter have."""
    return getattr(TrialConfig, name, None)


def in_turns(queues: Sequence[Sequence[WarmPoint]], count: int) -> list[WarmPoint]:
    """Up to `count` different points, one of each queue in turn."""
    taken: list[WarmPoint] = []
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and all(queue[place].point != other.point for other in taken):
                taken.append(queue[place])
    return taken[:count]
