"""Which trials may win: all complete ones, or those that a person chose at the end of a study.

`tuner resume STUDY --pick TRIAL` takes one trial of the Pareto front, or any other complete one;
`--max-latency-ms X` takes the best that are quick enough. What is chosen is trained again, scored
and registered as any winner is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.errors import InputError
from core.report import Status

from ..goals.costs import COSTS

if TYPE_CHECKING:
    from ..studies.study import Study, TrialRecord
    from .crown import FinalistOptions


def chosen(
    trials: Sequence[TrialRecord], study: str, options: FinalistOptions
) -> list[TrialRecord]:
    """Those of a study's complete trials that may win."""
    return [
        trial
        for trial in trials
        if trial.status == Status.COMPLETE
        and (options.pick is None or _is_named(options.pick, study, trial))
        and all(trial.metrics[name] <= most for name, most in options.most.items())
    ]


def check_choice(parts: Sequence[Study], options: FinalistOptions) -> None:
    """Raises InputError for a choice that cannot be made among the trials that there are.

    `parts`: a study, and its fine-tuning part if that has begun.
    """
    if options.pick is None and not options.most:
        return
    from ..studies.study import trial_records

    found: list[tuple[str, TrialRecord]] = []
    for part in parts:
        space = part.space()
        for name in options.most:
            if not space.costs:
                raise InputError(
                    "the study has not measured what its models cost",
                    where=_flag(name),
                    hint=f"a space measures it that has {name} among objectives or constraints",
                )
        found += [(part.record.name, t) for t in trial_records(part.optuna(), space)]
    if options.pick is not None:
        _check_pick(found, options.pick)
    for name, most in options.most.items():
        complete = [(n, t) for n, t in found if t.status == Status.COMPLETE]
        if complete and not any(t.metrics[name] <= most for _, t in complete):
            study, least = min(complete, key=lambda pair: pair[1].metrics[name])
            raise InputError(
                f"no complete trial has at most {most:g} {COSTS[name]}: the least has "
                f"{least.metrics[name]:g} (trial {least.number} of {study})",
                where=_flag(name),
            )


def _check_pick(found: Sequence[tuple[str, TrialRecord]], pick: str) -> None:
    """One trial is meant, and it is complete."""
    named = [(study, trial) for study, trial in found if _is_named(pick, study, trial)]
    if not named:
        hint = f"see: tuner trials {found[0][0]}" if found else "there is none yet"
        raise InputError(f"there is no trial {pick}", where="--pick", hint=hint)
    if len(named) > 1:
        labels = " or ".join(f"{study}/{trial.number}" for study, trial in named)
        raise InputError(f"{pick} may be {labels}", where="--pick", hint="write one of them")
    ((study, trial),) = named
    if trial.status != Status.COMPLETE:
        reason = f": {trial.reason}" if trial.status == Status.INFEASIBLE else ""
        raise InputError(
            f"trial {trial.number} is {trial.status}{reason}",
            where="--pick",
            hint=f"a trial that is complete can be picked: tuner trials {study}",
        )


def _is_named(pick: str, study: str, trial: TrialRecord) -> bool:
    return pick in (str(trial.number), f"{study}/{trial.number}")


def _flag(cost: str) -> str:
    return f"--max-{cost.replace('_', '-')}"
