"""From the best trials to one model: the best of many noisy scores flatters itself.

The best few trials, probes and fine-tuned ones alike, are trained again over several seeds; the
best mean wins, and the difference between its first score and that mean is reported as optimism.
On request several finalists become an ensemble (`tuner.finalists.ensemble`), and what won is
trained once more on training and validation rows together (a refit). What came out is scored once
on test (`tuner.finalists.scoring`). Read `crown` first; it runs in the driver and hands its work to
a `Runner`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import InputError

from ..goals.constraints import NO_BOUNDS, RECALL, why_not
from ..trials.context import Context
from .ensemble import EnsembleReport, Part, choose_ensemble, validation_logits
from .repeats import Candidate, Record, Repeat, Runner, clear_weights, repeats_of, train_missing
from .scoring import Scored, Verdict, score_and_save

NUM_FINALISTS = 5
NUM_SEEDS = 3
STEP = "winner scored on test: model"


@dataclass(frozen=True, kw_only=True)
class FinalistOptions:
    """How a study ends, as a person asked for it."""

    count: int = NUM_FINALISTS
    """Trials that are trained again, >= 1."""
    seeds: int = NUM_SEEDS
    """New seeds of each, >= 1."""
    refit: bool = False
    """Whether what won is trained once more on training and validation rows."""
    ensemble: int | None = None
    """Picks of an ensemble at most, >= 2; None: a single model."""
    pick: str | None = None
    """The only trial that may win: its number, or STUDY/NUMBER of a two-part study."""
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    """Trials that cost more may not win."""

    def __post_init__(self) -> None:
        """Raises InputError that names the flag."""
        for flag, value, least in (
            ("--finalists", self.count, 1),
            ("--seeds", self.seeds, 1),
            ("--ensemble", self.ensemble, 2),
        ):
            if value is not None and value < least:
                raise InputError(f"at least {least} must hold, but got {value}", where=flag)
        for name, most in self.most.items():
            if not most > 0:
                flag = f"--max-{name.replace('_', '-')}"
                raise InputError(f"it must be positive, but got {most:g}", where=flag)
        if self.ensemble is not None and self.seeds < 2:
            raise InputError(
                "an ensemble is judged by seeds that did not pick it, so it takes 2 or more",
                where="--ensemble",
                hint="with --seeds 3",
            )

    @property
    def most(self) -> dict[str, float]:
        """Name of a cost -> the most that a winner may have."""
        limits = {"latency_ms": self.max_latency_ms, "size_mb": self.max_size_mb}
        return {name: most for name, most in limits.items() if most is not None}


AS_USUAL = FinalistOptions()
"""Five finalists, three seeds, a single model, no refit."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A candidate after its repetitions."""

    study: str
    number: int
    backbone: str
    mode: str
    value: float
    """As in the search."""
    values: tuple[float, ...]
    """The objective of each repetition that did not diverge."""
    failed: int
    """Repetitions that did."""
    worst_class_recall: float | None = None
    """The mean of its repetitions; None where no class has enough pictures."""
    out: str = ""
    """The constraint that it violates, on which account it cannot win."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """Standard deviation over the repetitions; 0 for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def label(self) -> str:
        return f"{self.study}/{self.number}"


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """What `--refit` came to."""

    num_images: int
    """Rows of training and validation together."""
    epochs: dict[str, int]
    """Member (study/number) -> epochs: the mean of its repetitions' best ones."""


@dataclass(frozen=True, kw_only=True)
class Winner:
    """What a study comes to."""

    study: str
    number: int
    """The best finalist; the model itself is an ensemble if `ensemble` says so."""
    settings: dict[str, Any]
    finalists: tuple[Finalist, ...]
    """Best mean first: the first is the winner."""
    optimism: float
    """The winner's value in the search minus the mean of its repetitions."""
    validation: float
    """The objective of the very model that is saved; with a refit, of that model before it."""
    evaluation: dict[str, Any]
    """Of the saved model on the test split: `Evaluation.to_dict()`."""
    learnt_nothing: bool
    """Whether the test split cannot tell it from the prior baseline."""
    folder: str
    """The saved model."""
    ensemble: EnsembleReport | None = None
    """None: none was asked for."""
    refit: RefitReport | None = None
    """None: none was asked for."""
    rounding: float = 0.0
    """See `tuner.finalists.scoring.Scored`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON; finalists with their mean and spread."""
        values = dataclasses.asdict(self)
        for row, finalist in zip(values["finalists"], self.finalists, strict=True):
            row |= {"mean": finalist.mean, "spread": finalist.spread}
        return values


Runs = list[tuple[Repeat, Record]]


def crown(
    context: Context,
    candidates: Sequence[Candidate],
    options: FinalistOptions,
    run: Runner,
    *,
    bounds: Mapping[str, float] = NO_BOUNDS,
) -> Winner:
    """Repeat the candidates, choose, score once on test, and save the winner's model.

    Repetitions that an earlier session finished are taken as they are. A finalist whose
    repetitions violate a constraint (`bounds`) on average is out. Raises InputError if none can be
    trained again, or all are out.
    """
    ranked, out = _keeping(context, _repeat(context, candidates, options.seeds, run), bounds)
    report: EnsembleReport | None = None
    parts: list[Part] = []
    if options.ensemble is not None:
        report, parts = choose_ensemble(context, ranked, num_picks=options.ensemble, run=run)
    if not parts:
        kept = [pair for pair in ranked[0] if not _violated([pair], bounds)]
        best, _ = max(kept, key=lambda r: -np.inf if r[1].value is None else r[1].value)
        parts = [Part(repeat=best)]
    refits: list[Repeat] | None = None
    if options.refit:
        refits = [_refit_of(part, ranked) for part in parts]
    saved = [part.repeat for part in parts] if refits is None else refits
    _require(saved, train_missing(context, saved, run, weights=True))
    verdict = Verdict(
        parts=tuple(parts),
        refits=None if refits is None else tuple(refits),
        logits=tuple(validation_logits(context, [part.repeat for part in parts], run)),
    )
    scored: Scored = run(score_and_save, [(0, STEP, verdict)], {STEP: 1})[0]
    clear_weights(context, keep=saved)
    winner = _winner(context, ranked, report, verdict, scored)
    return dataclasses.replace(winner, finalists=(*winner.finalists, *out))


def _repeat(
    context: Context, candidates: Sequence[Candidate], num_seeds: int, run: Runner
) -> list[Runs]:
    """The repetitions of each candidate of which any came to an end, best mean first."""
    repeats = [repeat for c in candidates for repeat in repeats_of(c, num_seeds)]
    records = train_missing(context, repeats, run)
    pairs = list(zip(repeats, records, strict=True))
    runs = [pairs[start : start + num_seeds] for start in range(0, len(pairs), num_seeds)]
    ended = [r for r in runs if any(record.value is not None for _, record in r)]
    if not ended:
        reasons = sorted({record.reason for _, record in pairs})
        raise InputError(
            f"no finalist could be trained again: {'; '.join(reasons)}",
            where=f"study {context.study}",
        )

    def place(runs: Runs) -> tuple[float, str, int]:
        finalist = _finalist(runs)
        return -finalist.mean, finalist.study, finalist.number

    return sorted(ended, key=place)


def _keeping(
    context: Context, ranked: list[Runs], bounds: Mapping[str, float]
) -> tuple[list[Runs], list[Finalist]]:
    """The finalists that keep the constraints, and those that do not."""
    reasons = [_violated(runs, bounds) for runs in ranked]
    kept = [runs for runs, reason in zip(ranked, reasons, strict=True) if not reason]
    out = [
        dataclasses.replace(_finalist(runs), out=reason)
        for runs, reason in zip(ranked, reasons, strict=True)
        if reason
    ]
    if not kept:
        raise InputError(
            f"every finalist violates a constraint once it is trained again: {out[0].label}: "
            f"{out[0].out}",
            where=f"study {context.study}",
            hint="with more finalists: tuner resume STUDY --finalists 20; or more trials",
        )
    return kept, out


def _violated(runs: Runs, bounds: Mapping[str, float]) -> str:
    """Why these repetitions cannot win together; empty if they can. Their costs are those of the
    trial, and have been judged."""
    recall = _mean_recall(runs)
    return why_not(bounds, {} if recall is None else {RECALL: recall})


def _mean_recall(runs: Runs) -> float | None:
    recalls = [r.worst_class_recall for _, r in runs if r.worst_class_recall is not None]
    return float(np.mean(recalls)) if recalls else None


def _finalist(runs: Runs) -> Finalist:
    candidate = runs[0][0].candidate
    values = tuple(record.value for _, record in runs if record.value is not None)
    return Finalist(
        study=candidate.study,
        number=candidate.number,
        backbone=candidate.config.backbone,
        mode=candidate.config.mode,
        value=candidate.value,
        values=values,
        failed=len(runs) - len(values),
        worst_class_recall=_mean_recall(runs),
    )


def _refit_of(part: Part, ranked: Sequence[Runs]) -> Repeat:
    """The same training on more rows. Its schedule is the one that was validated, and it ends
    where validation found the best weights on average over the seeds."""
    (runs,) = [r for r in ranked if r[0][0].candidate == part.repeat.candidate]
    epochs = [record.best_epoch for _, record in runs if record.value is not None]
    mean = float(np.mean([epoch for epoch in epochs if epoch is not None]))
    return dataclasses.replace(part.repeat, last_epoch=max(1, round(mean)))


def _require(repeats: Sequence[Repeat], records: Sequence[Record]) -> None:
    for repeat, record in zip(repeats, records, strict=True):
        if record.value is None:
            raise InputError(
                f"trial {repeat.candidate.label} could not be refitted: {record.reason}",
                where="--refit",
                hint="leave it out: tuner resume STUDY --no-refit",
            )


def _winner(
    context: Context,
    ranked: Sequence[Runs],
    ensemble: EnsembleReport | None,
    verdict: Verdict,
    scored: Scored,
) -> Winner:
    finalists = tuple(_finalist(runs) for runs in ranked)
    best = ranked[0][0][0].candidate
    own = next((r for runs in ranked for x, r in runs if x == verdict.parts[0].repeat), None)
    assert own is not None
    alone = len(verdict.parts) == 1 and own.value is not None
    refit = None
    if verdict.refits is not None:
        epochs = {x.candidate.label: x.epochs for x in verdict.refits}
        refit = RefitReport(num_images=scored.num_fitted, epochs=epochs)
    return Winner(
        study=best.study,
        number=best.number,
        settings=best.config.to_dict(),
        finalists=finalists,
        optimism=best.value - finalists[0].mean,
        # Over folds, a single model's is the mean that it was chosen by.
        validation=own.value if alone and own.value is not None else scored.validation,
        evaluation=scored.evaluation,
        learnt_nothing=scored.learnt_nothing,
        folder=scored.folder,
        ensemble=ensemble,
        refit=refit,
        rounding=scored.rounding,
    )
