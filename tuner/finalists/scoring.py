"""The model that won, scored once on the test split and saved. Runs in a worker.

Calibration and thresholds are fitted on validation scores. A refitted model has been trained on
those rows and would look surer there than it is, so its calibration and thresholds are those of
the same configuration before the refit: no other rows are left, and more training rows shift them
less than seeing the answers would. The test score is that of the model that is saved.
N pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..trials.channel import ChannelHandle
from ..trials.context import Context
from .ensemble import Part, validation_targets
from .repeats import MAILBOX, Repeat, rows_of_refit
from .served_check import check_served
from .trained import open_trained

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.served import Member


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be saved."""

    parts: tuple[Part, ...]
    """One, or the members of an ensemble."""
    refits: tuple[Repeat, ...] | None
    """What takes the place of each part; None: the parts themselves."""
    logits: tuple[Tensor, ...]
    """Of each part on the validation rows, [N, C]."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the saved model came to."""

    validation: float
    """The objective of the parts, before any refit."""
    evaluation: dict[str, Any]
    learnt_nothing: bool
    folder: str
    num_fitted: int
    """Rows that the saved model was trained on."""
    rounding: float
    """How far the served model, which computes in float32, is from what was scored: the largest
    difference of a probability on some test pictures."""


def score_and_save(
    context: Context, payload: tuple[int, str, Verdict], channel: ChannelHandle
) -> Scored:
    """Calibrate on validation, judge on test, and write the model to the study's folder."""
    import torch

    from core.models.evaluation import best_thresholds, evaluate, fit_calibration, learnt_nothing
    from core.objectives import METRICS

    place, step, verdict = payload
    table, split = context.table, context.split
    val_targets_NC = validation_targets(context)
    own = [fit_calibration(logits_NC, val_targets_NC) for logits_NC in verdict.logits]
    val_logits_NC = _together(verdict.parts, verdict.logits, own)
    calibration = fit_calibration(val_logits_NC, val_targets_NC)
    scale, bias = calibration
    thresholds = best_thresholds(
        torch.sigmoid(val_logits_NC * scale + bias), val_targets_NC
    ).tolist()
    trained = [
        open_trained(context, repeat)
        for repeat in verdict.refits or [part.repeat for part in verdict.parts]
    ]
    test_logits = [model.logits(split.test) for model in trained]
    probabilities = torch.sigmoid(_together(verdict.parts, test_logits, own) * scale + bias)
    rows = split.pairs()[0][0] if verdict.refits is None else rows_of_refit(split)
    evaluation = evaluate(
        probabilities,
        torch.from_numpy(table.targets_NC[split.test]),
        class_names=table.class_names,
        train_targets=torch.from_numpy(table.targets_NC[rows]),
        thresholds=thresholds,
    )
    folder = context.folder / "model"
    _save(
        folder,
        verdict,
        [model.member() for model in trained],
        own,
        class_names=table.class_names,
        calibration=calibration,
        thresholds=thresholds,
        metadata=_metadata(context, verdict, rows),
    )
    rounding = check_served(
        context,
        folder,
        tuned=[part.repeat.config.mode == "finetune" for part in verdict.parts],
        probabilities_NC=probabilities.numpy(),
    )
    channel.deliver(MAILBOX, (place, step, 1))
    return Scored(
        validation=float(METRICS[context.objective](val_logits_NC, val_targets_NC)),
        evaluation=evaluation.to_dict(),
        learnt_nothing=learnt_nothing(evaluation),
        folder=str(folder),
        num_fitted=len(rows),
        rounding=rounding,
    )


def _together(
    parts: Sequence[Part], logits: Sequence[Tensor], calibrations: Sequence[tuple[float, float]]
) -> Tensor:
    """Logits [N, C] of the model that the parts make, before its own calibration."""
    from core.models.ensemble import mean_logits

    if len(parts) == 1:
        return logits[0]
    weights = [part.weight for part in parts]
    return mean_logits(logits, calibrations=calibrations, weights=weights)


def _save(
    folder: Path,
    verdict: Verdict,
    members: Sequence[Member],
    calibrations: Sequence[tuple[float, float]],
    **about: Any,
) -> None:
    import dataclasses

    from core.models.model import save_ensemble, save_model

    if len(members) > 1:
        shares = zip(members, verdict.parts, calibrations, strict=True)
        weighted = [
            dataclasses.replace(member, weight=part.weight, calibration=calibration)
            for member, part, calibration in shares
        ]
        save_ensemble(folder, members=weighted, **about)
        return
    (member,) = members
    save_model(
        folder,
        encoder=member.encoder,
        head=member.head,
        head_spec=member.head_spec,
        pooling=member.pooling,
        blocks=member.blocks,
        feature_mean_D=member.feature_mean_D,
        feature_std_D=member.feature_std_D,
        input_size=member.encoder.backbone.input_size,
        **about,
    )


def _metadata(context: Context, verdict: Verdict, fitted: Any) -> dict[str, Any]:
    from ..predict import data_record

    test = context.split.test
    validation = np.setdiff1d(context.split.pairs()[0][1], fitted)
    first = verdict.parts[0].repeat
    metadata = {
        "study": context.study,
        "trial": first.candidate.number,
        "settings": first.config.to_dict(),
        "data": data_record(
            context.table, {"train": fitted, "validation": validation, "test": test}
        ),
        "members": [
            {
                "study": part.repeat.candidate.study,
                "trial": part.repeat.candidate.number,
                "weight": part.weight,
                "settings": part.repeat.config.to_dict(),
            }
            for part in verdict.parts
        ],
        "refit": None,
    }
    if verdict.refits is not None:
        metadata["refit"] = {
            "epochs": [repeat.epochs for repeat in verdict.refits],
            "calibration_and_thresholds": "validation scores of the model before the refit",
        }
    return metadata
