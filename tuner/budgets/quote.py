"""What a study will take, before it starts: features, hours and device-hours, with a range.

Settings are drawn from the space as its trials will be, and each is priced by speeds that this
machine showed (`tuner.budgets.calibration`) or that a short measurement gave
(`tuner.budgets.speed_test`). What nobody has measured is taken from the nearest thing that was,
with a wider range. Samplers turn to the settings that win, which may cost more or less than those
drawn here: that is in the factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.config import TrialConfig
from core.errors import InputError

from ..finalists.crown import FinalistOptions
from ..sampling.rounds import num_rounds
from ..spaces.space import SearchSpace
from ..studies.plan import Plan
from ..trials.context import request_of
from .calibration import NOTHING, Calibration, Estimate, Line, within
from .model_costs import CostsAhead, measuring_seconds
from .prices import Features, epochs_share, feature_seconds, training_seconds
from .speeds import SESSION, cohort_key, extraction_key, finalists_key, first_key

DRAWN = 48
"""Configurations drawn to price a trial."""
COHORT = {
    "probe": Line(fixed=2.0, slope=1.1, factor=1.5),
    "finetune": Line(fixed=4.0, slope=1.1, factor=1.5),
}
EXTRACTION = Line(fixed=8.0, slope=1.05, factor=1.6)
FINALISTS = {
    "probe": Line(fixed=10.0, slope=1.1, factor=2.0),
    "finetune": Line(fixed=20.0, slope=1.1, factor=2.0),
}
FIRST_COHORT = within(10.0, 2.0)
NO_COSTS = CostsAhead()
SESSION_SECONDS = within(25.0, 2.5)
"""Ray's start and end, and the registration, where no study has shown it."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Extraction workers, or trials, and what each of them has."""

    device: str
    """`tuner.budgets.speeds.device_name`."""
    threads: int
    """`tuner.budgets.speeds.threads_of`."""
    devices: float
    """`tuner.budgets.device_time.devices_of_trial`."""
    count: int
    """At once."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a study, as a quote needs it."""

    space: SearchSpace
    plan: Plan
    done: int
    """Trials that have ended already."""
    configs: tuple[TrialConfig, ...]
    """Drawn from the space: see `draw_configs`."""
    features: tuple[Features, ...]
    extractors: Crew
    trainers: Crew
    costs: CostsAhead = NO_COSTS
    """What measuring costs takes, and what they will have refused."""


@dataclass(frozen=True, kw_only=True)
class PartQuote:
    """What a part takes. Seconds are those of one worker after another."""

    mode: str
    trials: int
    """Still to be run, as far as the budget of time allows."""
    wanted: int
    """Still to be run in all."""
    features: tuple[tuple[Features, Estimate], ...]
    extraction: Estimate
    training: Estimate
    measuring: Estimate = NOTHING
    """Of the costs of models."""
    num_measured: int = 0
    """Kinds of models whose costs are to be measured."""
    refused: Estimate | None = NOTHING
    """Trials that end untrained, as their cost violates a constraint; None: not known yet."""


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What a study takes from now on."""

    parts: tuple[PartQuote, ...]
    finalists: Estimate
    """Device seconds."""
    seconds: Estimate
    """From start to end."""
    device_seconds: Estimate

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what the truth is held against at the end."""
        return {
            "trials": [part.trials for part in self.parts],
            "seconds": [self.seconds.low, self.seconds.value, self.seconds.high],
            "device_seconds": [
                self.device_seconds.low, self.device_seconds.value, self.device_seconds.high
            ],
        }  # fmt: skip


def make_quote(
    parts: Sequence[Part],
    options: FinalistOptions,
    calibration: Calibration,
    *,
    precision: str,
    rows: int,
    used: float = 0.0,
) -> Quote:
    """The quote of a study's parts, the one that ends it last.

    Args:
        precision: in which features and heads are computed.
        rows: training rows an epoch, those of all folds.
        used: device seconds that the study has used already.
    """
    seconds, device_seconds = calibration.number(SESSION) or SESSION_SECONDS, NOTHING
    quoted = []
    for part in parts:
        features = tuple(
            (f, feature_seconds(f, part.extractors.device, precision, calibration))
            for f in part.features
        )
        extraction = _extraction(part, features, calibration)
        training = _training(part, precision, rows, calibration)
        measuring = measuring_seconds(part.costs, part.extractors.device, calibration)
        # Extraction workers share the work of one; trials run side by side.
        begun, crew = seconds + measuring + extraction, part.trainers
        device_seconds += measuring * part.extractors.devices
        device_seconds += extraction * (part.extractors.count * part.extractors.devices)
        limits = _limits(part, begun.value, used + device_seconds.value)
        wanted = max(0, part.plan.trials - part.done)
        training, trials = _within_limits(training, wanted, limits)
        quoted.append(
            PartQuote(
                mode=part.space.mode,
                trials=trials,
                wanted=wanted,
                features=features,
                extraction=extraction,
                training=training,
                measuring=measuring,
                num_measured=part.costs.num_unmeasured,
                refused=_refused(trials, part.costs),
            )
        )
        seconds = begun + training * (1 / max(1, min(crew.count, trials)))
        device_seconds += training * crew.devices
    finalists = _finalists(parts[-1], options, precision, rows, calibration)
    crew = parts[-1].trainers
    return Quote(
        parts=tuple(quoted),
        finalists=finalists * crew.devices,
        seconds=seconds + finalists * (1 / crew.count),
        device_seconds=device_seconds + finalists * crew.devices,
    )


def draw_configs(space: SearchSpace, count: int = DRAWN) -> tuple[TrialConfig, ...]:
    """Configurations as the first trials will have them: the space's points, then by chance;
    always the same ones."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point in space.points[: count // 4]:
        study.enqueue_trial(space.to_params(point))
    drawn = []
    for _ in range(count):
        try:
            drawn.append(TrialConfig.from_dict(space.suggest(study.ask())))
        except InputError:
            continue  # Such a trial fails in the study, too, and costs nothing.
    return tuple(drawn)


def _extraction(
    part: Part, features: Sequence[tuple[Features, Estimate]], calibration: Calibration
) -> Estimate:
    """Seconds until all matrices are there; a worker starts and looks even if none lacks."""
    line = calibration.line(extraction_key(part.extractors.device)) or EXTRACTION
    total = sum((seconds for _, seconds in features), NOTHING) * (1 / part.extractors.count)
    return _along(line, total, 1)


def _training(part: Part, precision: str, rows: int, calibration: Calibration) -> Estimate:
    """Seconds of all cohorts of a part, one after another."""
    trials = max(0, part.plan.trials - part.done)
    if not trials or not part.configs:
        return NOTHING
    epoch = _mean_epoch(part, precision, rows, calibration)
    share = epochs_share(part.space, part.plan, calibration)
    kept = part.costs.kept * trials
    total = Estimate(
        low=epoch.low * share.low * kept.low,
        value=epoch.value * share.value * kept.value,
        high=epoch.high * share.high * kept.high,
    )
    mode, device = part.space.mode, part.trainers.device
    line = calibration.line(cohort_key(device, mode)) or COHORT[mode]
    first = calibration.number(first_key(device, mode)) or FIRST_COHORT
    num_kept = math.ceil(kept.value)
    if not num_kept:
        return NOTHING
    if mode == "finetune":
        return first + _along(line, total, num_kept - 1)
    cohorts = num_rounds(part.space, part.done, part.done + trials)
    if part.trainers.count > 1:  # Then each trains on features of one kind.
        cohorts *= len({request_of(config) for config in part.configs})
    cohorts = min(num_kept, cohorts)
    return first + _along(line, total * (1 / part.trainers.threads), cohorts - 1)


def _refused(trials: int, costs: CostsAhead) -> Estimate | None:
    """How many of so many trials end untrained."""
    if not costs.known:
        return None
    kept = costs.kept
    return Estimate(
        low=trials * (1 - kept.high), value=trials * (1 - kept.value), high=trials * (1 - kept.low)
    )


def _mean_epoch(part: Part, precision: str, rows: int, calibration: Calibration) -> Estimate:
    """Training seconds of a trial that nobody ends, on one thread."""
    each = [
        training_seconds(config, part.trainers.device, precision, calibration) * config.epochs
        for config in part.configs
    ]
    return sum(each, NOTHING) * (rows / 1000 / len(each))


def _finalists(
    part: Part,
    options: FinalistOptions,
    precision: str,
    rows: int,
    calibration: Calibration,
) -> Estimate:
    """Seconds of one trial's devices after another, until the winner is scored."""
    if not part.configs:
        return NOTHING
    mode = part.space.mode
    count = min(options.count, max(part.plan.trials, 1)) * options.seeds + options.refit
    line = calibration.line(finalists_key(part.trainers.device, mode)) or FINALISTS[mode]
    total = _mean_epoch(part, precision, rows, calibration) * count
    return _along(line, total * (1 / (part.trainers.threads if mode == "probe" else 1)), 1)


def _along(line: Line, part: Estimate, times: float) -> Estimate:
    return Estimate(
        low=line(part.low, times).low,
        value=line(part.value, times).value,
        high=line(part.high, times).high,
    )


def _limits(part: Part, begun: float, used: float) -> list[float]:
    """Seconds of trials, one after another, that each budget of time leaves, `begun` seconds after
    the start and after `used` device seconds."""
    limits = []
    if part.plan.seconds is not None:
        limits.append(max(0.0, part.plan.seconds - begun) * part.trainers.count)
    if part.plan.device_seconds is not None:
        limits.append(max(0.0, part.plan.device_seconds - used) / part.trainers.devices)
    return limits


def _within_limits(
    training: Estimate, trials: int, limits: Sequence[float]
) -> tuple[Estimate, int]:
    """What budgets of time leave of the training, and of its trials. Cohorts that run when a
    budget is spent still end: they are few."""
    if not limits or training.value <= min(limits):
        return training, trials
    limit = min(limits)
    kept = Estimate(
        low=min(training.low, limit), value=limit, high=min(training.high, limit * 1.25)
    )
    return kept, min(trials, max(1, round(trials * limit / training.value)) if limit else 0)
