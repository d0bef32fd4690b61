"""From the best trials to one model: the best of many noisy scores flatters itself.

The best few trials are trained again over several seeds; the best mean wins, and the difference
between its first score and that mean is reported as optimism. The winner is then scored once on
the test split, calibrated and given thresholds on validation, and saved. Runs in a worker.
(A fine-tuned trial is not trained again: its own best epoch is saved.)
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.config import TrialConfig
from core.errors import InputError
from core.report import Metrics, Outcome
from core.views import PLAIN

from .channel import ChannelHandle
from .cohort import open_matrix, train_cohort
from .context import Context, FeatureRequest, build_backbone, request_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core.encoders import Encoder

MAILBOX = "finalists"
SEED_OFFSET = 500_000_003
"""Between a trial's own seed and those of its repetitions."""
SERVED_PICTURES = 8
"""Test pictures on which the saved model must answer as the trained one did."""
SERVED_TOLERANCE = 0.05
"""Largest difference of a probability there: features are computed in bfloat16 where that is fast,
a served model computes in float32."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial that may win."""

    number: int
    config: TrialConfig
    value: float
    """Its best validation objective in the search."""
    features: Mapping[str, str]
    """View's name -> folder of its feature matrix."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A candidate after its repetitions."""

    number: int
    value: float
    """As in the search."""
    values: tuple[float, ...]
    """The objective of each repetition."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """Standard deviation over the repetitions; 0 for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Winner:
    """What a study comes to."""

    number: int
    settings: dict[str, Any]
    finalists: tuple[Finalist, ...]
    """Best mean first: the first is the winner."""
    optimism: float
    """The winner's value in the search minus the mean of its repetitions."""
    validation: float
    """The objective of the very model that is saved."""
    evaluation: dict[str, Any]
    """On the test split: `Evaluation.to_dict()`."""
    learnt_nothing: bool
    """Whether the test split cannot tell it from the prior baseline."""
    folder: str
    """The saved model."""


def crown(
    context: Context, candidates: Sequence[Candidate], num_seeds: int, channel: ChannelHandle
) -> Winner:
    """Repeat the candidates, choose, score once on test, and save the winner's model.

    Delivers (epochs done, epochs to do) of the repetitions through the channel.
    """
    if candidates[0].config.mode == "finetune":
        best = max(candidates, key=lambda c: c.value)
        finalists = [Finalist(number=best.number, value=best.value, values=(best.value,))]
        model = _finetuned_model(context, best)
    else:
        finalists, model = _repeat_probes(context, candidates, num_seeds, channel)
    best = next(c for c in candidates if c.number == finalists[0].number)
    return _score_and_save(context, best, tuple(finalists), model)


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A trained classifier in parts, and its logits on the rows that count."""

    encoder: Encoder
    head: nn.Module
    mean_D: Tensor | None
    deviation_D: Tensor | None
    validation: float
    validation_logits_NC: Tensor
    test_logits_NC: Tensor


def _repeat_probes(
    context: Context, candidates: Sequence[Candidate], num_seeds: int, channel: ChannelHandle
) -> tuple[list[Finalist], _Model]:
    groups: dict[FeatureRequest, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[request_of(candidate.config)].append(candidate)
    runs: dict[int, list[tuple[TrialConfig, Outcome]]] = {}
    total = sum(max(m.config.epochs for m in members) for members in groups.values())
    done = 0

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        channel.deliver(MAILBOX, (done + epoch, total))
        return ()

    for members in groups.values():
        configs = [
            dataclasses.replace(member.config, seed=member.config.seed + SEED_OFFSET * (1 + repeat))
            for member in members
            for repeat in range(num_seeds)
        ]
        outcomes = train_cohort(
            context,
            configs,
            numbers=[member.number for member in members for _ in range(num_seeds)],
            features=members[0].features,
            report=report,
            keep_state=True,
        )
        pairs = list(zip(configs, outcomes, strict=True))
        for place, member in enumerate(members):
            runs[member.number] = pairs[place * num_seeds : (place + 1) * num_seeds]
        done += max(member.config.epochs for member in members)
    finalists = [
        Finalist(number=c.number, value=c.value, values=_values(runs[c.number]))
        for c in candidates
        if _values(runs[c.number])
    ]
    if not finalists:
        raise InputError("no finalist could be trained again: all of them diverged")
    finalists.sort(key=lambda f: (-f.mean, f.number))
    winner = next(c for c in candidates if c.number == finalists[0].number)
    config, outcome = max(
        (run for run in runs[winner.number] if run[1].best_value is not None),
        key=lambda run: run[1].best_value or 0.0,
    )
    return finalists, _probe_model(context, config, outcome, winner.features[PLAIN.name])


def _values(runs: Sequence[tuple[TrialConfig, Outcome]]) -> tuple[float, ...]:
    return tuple(o.best_value for _, o in runs if o.best_value is not None)


def _probe_model(context: Context, config: TrialConfig, outcome: Outcome, features: str) -> _Model:
    import torch

    from core.heads import build_head
    from core.inputs import HeadInputs
    from core.stack import head_settings

    train, validation = context.split.pairs()[0]
    inputs = HeadInputs(
        open_matrix(features), norm=config.feature_norm, train_rows=train, device="cpu"
    )
    head = build_head(
        num_features=inputs.num_features,
        num_classes=context.table.num_classes,
        **head_settings(config),
    ).eval()
    assert outcome.state is not None and outcome.best_value is not None
    head.load_state_dict(outcome.state)

    @torch.inference_mode()
    def logits(rows: Any) -> Tensor:
        parts = []
        for start in range(0, len(rows), 256):
            x = inputs.batch(rows[start : start + 256])
            # A head module reads maps [N, D, h, w]; places in one row are as good as in a square.
            parts.append(head(x.transpose(1, 2).unsqueeze(2) if head.spatial else x))
        return torch.cat(parts)

    return _Model(
        encoder=build_backbone(context, request_of(config)),
        head=head,
        mean_D=inputs.mean_D,
        deviation_D=inputs.deviation_D,
        validation=outcome.best_value,
        validation_logits_NC=logits(validation),
        test_logits_NC=logits(context.split.test),
    )


def _finetuned_model(context: Context, candidate: Candidate) -> _Model:
    import torch
    from safetensors.torch import load_file

    from core.finetune import PictureClassifier, picture_logits
    from core.heads import HEADS, build_head
    from core.pooling import num_head_features
    from core.stack import head_settings

    config = candidate.config
    encoder = build_backbone(context, request_of(config))
    head = build_head(
        num_features=num_head_features(
            encoder,
            spatial=HEADS[config.head].spatial,
            pooling=config.pooling,
            blocks=config.blocks,
        ),
        num_classes=context.table.num_classes,
        **head_settings(config),
    )
    model = PictureClassifier(encoder, head, pooling=config.pooling, blocks=config.blocks)
    model.load_state_dict(load_file(context.state_path(candidate.number)))
    pictures = open_matrix(candidate.features[PLAIN.name])
    _, validation = context.split.pairs()[0]
    device = torch.device("cpu")
    return _Model(
        encoder=encoder,
        head=head,
        mean_D=model.mean_D,
        deviation_D=model.deviation_D,
        validation=candidate.value,
        validation_logits_NC=picture_logits(model, pictures, validation, device),
        test_logits_NC=picture_logits(model, pictures, context.split.test, device),
    )


def _score_and_save(
    context: Context, winner: Candidate, finalists: tuple[Finalist, ...], model: _Model
) -> Winner:
    import torch

    from core.evaluation import best_thresholds, evaluate, fit_calibration, learnt_nothing
    from core.model import save_model
    from core.stack import head_settings

    table, split = context.table, context.split
    train, validation = split.pairs()[0]
    targets_NC = torch.from_numpy(table.targets_NC)
    scale, bias = fit_calibration(model.validation_logits_NC, targets_NC[validation])
    thresholds = best_thresholds(
        torch.sigmoid(model.validation_logits_NC * scale + bias), targets_NC[validation]
    ).tolist()
    probabilities = torch.sigmoid(model.test_logits_NC * scale + bias)
    evaluation = evaluate(
        probabilities,
        targets_NC[split.test],
        class_names=table.class_names,
        train_targets=targets_NC[train],
        thresholds=thresholds,
    )
    head_spec = {k: v for k, v in head_settings(winner.config).items() if k != "seed"}
    folder = context.folder / "model"
    save_model(
        folder,
        encoder=model.encoder,
        head=model.head,
        head_spec=head_spec,
        class_names=table.class_names,
        pooling=winner.config.pooling,
        blocks=winner.config.blocks,
        feature_mean_D=model.mean_D,
        feature_std_D=model.deviation_D,
        calibration=(scale, bias),
        thresholds=thresholds,
        input_size=model.encoder.backbone.input_size,
        metadata=_metadata(context, winner, train, validation),
    )
    _check_served(context, folder, probabilities.numpy())
    return Winner(
        number=winner.number,
        settings=winner.config.to_dict(),
        finalists=finalists,
        optimism=winner.value - finalists[0].mean,
        validation=model.validation,
        evaluation=evaluation.to_dict(),
        learnt_nothing=learnt_nothing(evaluation),
        folder=str(folder),
    )


def _metadata(context: Context, winner: Candidate, train: Any, validation: Any) -> dict[str, Any]:
    from .predict import data_record

    parts: Mapping[str, Any] = {
        "train": train,
        "validation": validation,
        "test": context.split.test,
    }
    return {
        "study": context.study,
        "trial": winner.number,
        "settings": winner.config.to_dict(),
        "data": data_record(context.table, parts),
    }


def _check_served(context: Context, folder: Path, probabilities_NC: Any) -> None:
    """The saved model, from picture files, must say what was scored from features."""
    from core.model import load_model

    rows = context.split.test[:SERVED_PICTURES]
    served_NC = load_model(folder).predict([context.table.paths[row] for row in rows])
    difference = float(np.abs(served_NC - probabilities_NC[: len(rows)]).max())
    if not difference <= SERVED_TOLERANCE:
        raise RuntimeError(
            f"the saved model differs from the trained one by {difference:.3f} on test pictures"
        )
