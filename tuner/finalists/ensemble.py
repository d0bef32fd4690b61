"""Whether several finalists together are better than the best of them, and which.

The library is every finalist that was trained under every seed. Weights are picked by the models
of one seed and judged by those of the others (`core.models.ensemble.select_over_seeds`), since the
best of many combinations flatters itself as the best of many trials does. The ensemble takes the
place of the single winner only if that estimate is above the winner's own mean over the seeds.
N pictures, C classes, S seeds, M members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..trials.channel import ChannelHandle
from ..trials.context import Context
from .repeats import MAILBOX, Record, Repeat, Runner, kept_path, train_missing
from .trained import open_trained

if TYPE_CHECKING:
    from torch import Tensor

STEP = "finalists asked about validation: model"


@dataclass(frozen=True, kw_only=True)
class EnsembleReport:
    """What `--ensemble` came to."""

    num_picks: int
    """Picks at most, as it was asked for."""
    weights: dict[str, float]
    """Finalist (study/number) -> its share; of an ensemble that was not taken, too."""
    estimate: float | None
    """Its validation objective, re-seeded; None: no finalist could be trained under all seeds."""
    single: float
    """The best finalist's mean over the seeds, on the same pictures."""
    registered: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """A repetition that goes into the saved model."""

    repeat: Repeat
    weight: float = 1.0


def choose_ensemble(
    context: Context,
    ranked: Sequence[Sequence[tuple[Repeat, Record]]],
    *,
    num_picks: int,
    run: Runner,
) -> tuple[EnsembleReport, list[Part]]:
    """The ensemble of the finalists' repetitions, and its members if it is to be registered.

    `ranked` are the repetitions of each finalist, the best one first.
    """
    import torch

    from core.models.ensemble import select_over_seeds
    from core.objectives import METRICS

    whole = [runs for runs in ranked if all(record.value is not None for _, record in runs)]
    asked = [repeat for runs in [ranked[0], *whole] for repeat, r in runs if r.value is not None]
    probs = dict(
        zip(
            (repeat.key for repeat in asked),
            (_probabilities(context, x) for x in validation_logits(context, asked, run)),
            strict=True,
        )
    )
    objective = METRICS[context.objective]
    targets_NC = validation_targets(context)
    own = [probs[repeat.key] for repeat, record in ranked[0] if record.value is not None]
    single = float(objective(torch.stack(own), targets_NC).double().mean())
    if not whole:
        report = EnsembleReport(
            num_picks=num_picks, weights={}, estimate=None, single=single, registered=False
        )
        return report, []
    chosen = select_over_seeds(
        torch.stack(
            [
                torch.stack([probs[runs[seed][0].key] for runs in whole])
                for seed in range(len(whole[0]))
            ]
        ),
        targets_NC,
        objective=objective,
        num_picks=num_picks,
    )
    shares = zip(whole, chosen.selection.weights, strict=True)
    parts = [Part(repeat=runs[chosen.seed][0], weight=w) for runs, w in shares if w > 0]
    report = EnsembleReport(
        num_picks=num_picks,
        weights={part.repeat.candidate.label: part.weight for part in parts},
        estimate=chosen.estimate,
        single=single,
        registered=len(parts) > 1 and chosen.estimate > single,
    )
    return report, parts if report.registered else []


def validation_logits(context: Context, repeats: Sequence[Repeat], run: Runner) -> list[Tensor]:
    """Logits [N, C] of each repetition on the (first fold's) validation rows. Kept in the study,
    so that a model is asked once."""
    from safetensors.torch import load_file

    unique = list({repeat.key: repeat for repeat in repeats}.values())
    missing = [repeat for repeat in unique if not _logits_path(context, repeat).exists()]
    if missing:
        train_missing(context, missing, run, weights=True)
        run(ask, list(enumerate(missing)), {STEP: len(missing)})
    return [load_file(_logits_path(context, repeat))["logits_NC"] for repeat in repeats]


def ask(context: Context, payload: tuple[int, Repeat], channel: ChannelHandle) -> None:
    """Compute and keep one repetition's validation logits, in this process."""
    from ..trials.cohort import save_state

    place, repeat = payload
    _, validation = context.split.pairs()[0]
    logits_NC = open_trained(context, repeat).logits(validation)
    save_state(_logits_path(context, repeat), {"logits_NC": logits_NC})
    channel.deliver(MAILBOX, (place, STEP, 1))


def validation_targets(context: Context) -> Tensor:
    """0/1 targets [N, C] of the rows of `validation_logits`."""
    import torch

    _, validation = context.split.pairs()[0]
    return torch.from_numpy(context.table.targets_NC[validation])


def _probabilities(context: Context, logits_NC: Tensor) -> Tensor:
    """Calibrated by itself, as it is in the ensemble that is served."""
    import torch

    from core.models.evaluation import fit_calibration

    scale, bias = fit_calibration(logits_NC, validation_targets(context))
    return torch.sigmoid(logits_NC * scale + bias)


def _logits_path(context: Context, repeat: Repeat) -> Path:
    return kept_path(context, repeat, "validation.safetensors")
