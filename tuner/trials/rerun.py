"""`tuner rerun`: one trial trained again by itself, its curve beside the one that was recorded.

What a trial is (settings, seed, order of pictures, rows, precision) does not depend on the trials
that ran beside it, so its curve must come again. Bit for bit it does where the same sums are taken
in the same order: a fine-tuning on as many threads. A head in a stack is a part of bigger products,
which round otherwise: then it must be equal within a tolerance. Nothing is written to the study or
to MLflow; features that the cache lacks are computed.
"""

from __future__ import annotations

import dataclasses
import enum
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import TrialConfig
from core.errors import InputError
from core.report import Metrics, Outcome, Status

from ..studies.outcomes import EndedTrial, OutcomeLog
from ..studies.study import Study
from .context import Context, FeatureRequest, context_of, request_of, view_requests

if TYPE_CHECKING:
    from ..home import Home
    from ..views.steps import Steps

LOSS_START = 1e-5
"""Relative difference of a loss that rounding may make in the first epoch; measured: some 1e-7."""
LOSS_GROWTH = 2.0
"""Training multiplies a difference; so much more an epoch is let pass (measured: 1.8 at most)."""
LOSS_MOST = 0.02
"""And never more than this. (A head of 30 epochs at a high rate: 0.015.)"""
SCORE_MOST = 0.01
"""Difference of a score: rounding turns the order of scores that are nearly equal."""
LABELS_MOST = 2
"""The same as labels, where there are so few that one is more than SCORE_MOST."""


class Verdict(enum.StrEnum):
    """How two curves compare."""

    BITWISE = "equal bit for bit"
    CLOSE = "equal within the tolerance of rounding"
    DIFFERENT = "different"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference of one metric over the epochs, measured by its tolerance."""

    metric: str
    epoch: int
    recorded: float
    again: float
    size: float
    """Relative for losses and rates, absolute for scores."""
    tolerance: float
    """At that epoch."""


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """A trial's two trainings."""

    trial: EndedTrial
    objective: str
    again: Outcome
    verdict: Verdict
    differences: tuple[Difference, ...]
    """One a metric; none where all numbers are the same."""
    reason: str = ""
    """Why they are DIFFERENT."""


def rerun(study: Study, number: int, home: Home, steps: Steps) -> Rerun:
    """Train a trial again and compare. Raises InputError if it has no curve, or its data, its
    weights or its features are not to be had."""
    trial = recorded_trial(study, number)
    config = TrialConfig.from_dict(dict(trial.settings))
    context = _context(study, home)
    with tempfile.TemporaryDirectory(prefix="tuner-rerun-") as outputs:
        context = dataclasses.replace(context, outputs=Path(outputs))
        features = _features(context, config, steps)
        again = _train(context, config, trial, features, steps)
    validation = [rows for _, rows in context.split.pairs()]
    num_labels = min(int(context.table.targets_NC[rows].sum()) for rows in validation)
    return compare(trial, again, objective=context.objective, num_labels=num_labels)


def recorded_trial(study: Study, number: int) -> EndedTrial:
    """A trial's end as this home recorded it. Raises InputError if there is none, or no curve."""
    ended, name = OutcomeLog(study.folder).read(), study.record.name
    if number not in ended:
        known = f"trials {min(ended)} to {max(ended)} have one" if ended else "no trial has one"
        raise InputError(
            f"trial {number} has no recorded end in this home ({known})",
            where=f"study {name}",
            hint=f"tuner trials {name} lists them; another driver's trials are in its own home",
        )
    trial = ended[number]
    if not trial.outcome.curve:
        raise InputError(
            f"trial {number} {trial.outcome.status.value} before its first epoch, so there is no "
            f"curve to compare: {trial.outcome.reason}",
            where=f"study {name}",
        )
    return trial


def compare(trial: EndedTrial, again: Outcome, *, objective: str, num_labels: int) -> Rerun:
    """The two curves epoch by epoch. `num_labels`: of the smallest validation part."""
    recorded = trial.outcome
    reason = ""
    if recorded.status is not again.status:
        reason = f"it {recorded.status.value} then, and {again.status.value} now"
    elif len(recorded.curve) != len(again.curve):
        reason = f"it had {len(recorded.curve)} epochs then, and {len(again.curve)} now"
    found = _differences(recorded, again, max(SCORE_MOST, LABELS_MOST / max(1, num_labels)))
    beyond = [d for d in found if not d.size <= d.tolerance]
    if not reason and beyond:
        worst = min(beyond, key=lambda d: d.epoch)
        reason = f"{worst.metric} of epoch {worst.epoch} was {worst.recorded}, is {worst.again}"
    equal = not found and recorded.best_metrics == again.best_metrics
    verdict = Verdict.BITWISE if equal else Verdict.CLOSE
    return Rerun(
        trial=trial,
        objective=objective,
        again=again,
        verdict=Verdict.DIFFERENT if reason else verdict,
        differences=tuple(found),
        reason=reason,
    )


def _differences(recorded: Outcome, again: Outcome, score_most: float) -> list[Difference]:
    worst: dict[str, Difference] = {}
    for epoch, (then, now) in enumerate(zip(recorded.curve, again.curve, strict=False), 1):
        for metric in sorted(then.keys() | now.keys()):
            a, b = then.get(metric, float("nan")), now.get(metric, float("nan"))
            if a == b:
                continue
            relative = metric.endswith("loss") or metric == "lr"
            size = abs(a - b) / (max(abs(a), abs(b)) if relative else 1.0)
            grown = min(LOSS_MOST, LOSS_START * LOSS_GROWTH ** (epoch - 1))
            difference = Difference(
                metric=metric, epoch=epoch, recorded=a, again=b, size=size,
                tolerance=grown if relative else score_most,
            )  # fmt: skip
            other = worst.get(metric)
            if other is None or not size / difference.tolerance <= other.size / other.tolerance:
                worst[metric] = difference
    return [worst[metric] for metric in sorted(worst)]


def _context(study: Study, home: Home) -> Context:
    """The study as its workers saw it, with all of this machine's cores."""
    import torch

    from core.data.split import Split

    from ..data import reread_table
    from .cluster import local_threads

    record = study.record
    data = dict(record.data)
    table = reread_table(data, skipped=record.skipped, fingerprint=record.fingerprint)
    return context_of(
        study,
        home,
        table,
        Split.load(study.split_path, table),
        rungs=(),
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        num_threads=local_threads(),
    )


def _features(context: Context, config: TrialConfig, steps: Steps) -> dict[str, str]:
    """Folder of each view that the trial reads, from the cache or computed now."""
    from ..features.feature_work import Progress, do_work, plan_work
    from .context import prepare_worker

    device = prepare_worker(context)
    requests = view_requests(request_of(config), config.views)

    def progress_of(request: FeatureRequest) -> Progress:
        return lambda done, total: steps(f"features of {request.label}", done, total)

    work = plan_work(context, requests, (0, 1))
    do_work(context, work, device=device, progress_of=progress_of)
    return {part.request.view: str(part.matrix.folder) for part in work.parts}


def _train(
    context: Context,
    config: TrialConfig,
    trial: EndedTrial,
    features: Mapping[str, str],
    steps: Steps,
) -> Outcome:
    from .cohort import train_cohort

    recorded = trial.outcome
    last = len(recorded.curve) if recorded.status is Status.PRUNED else None
    name = f"trial {trial.number} again: epoch"

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        steps(name, epoch, last or config.epochs)
        return (0,) if epoch == last else ()

    (again,) = train_cohort(
        context, [config], numbers=[trial.number], features=[features], report=report
    )
    return again
