"""A repetition as a model: its parts, and its logits on rows of the table.

A probe's head reads cached features and meets its backbone only when the model is saved; a
fine-tuned one reads decoded pictures. Runs in a worker. N pictures, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.data.split import IntArray
from core.images.views import PLAIN

from ..trials.cohort import open_matrix
from ..trials.context import Context, build_backbone, prepare_worker, request_of
from .repeats import Repeat, context_of, state_path

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.served import Member

ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained classifier."""

    logits: Callable[[IntArray], Tensor]
    """Rows of the table -> logits [N, C] on the CPU."""
    member: Callable[[], Member]
    """Its parts, for saving: uncalibrated, of weight 1."""


def open_trained(context: Context, repeat: Repeat) -> Trained:
    """The model that a repetition left in the study's folder."""
    own = context_of(context, repeat)
    return (_finetuned if repeat.config.mode == "finetune" else _probe)(own, context, repeat)


def _probe(own: Context, study: Context, repeat: Repeat) -> Trained:
    import torch
    from safetensors.torch import load_file

    from core.encoding.inputs import HeadInputs
    from core.head_settings import head_settings
    from core.heads import build_head
    from core.models.served import Member

    config = repeat.config
    train, _ = own.split.pairs()[0]
    prepare_worker(study)
    inputs = HeadInputs(
        open_matrix(repeat.candidate.features[PLAIN.name]),
        norm=config.feature_norm,
        train_rows=train,
        device="cpu",
    )
    head = build_head(
        num_features=inputs.num_features,
        num_classes=own.table.num_classes,
        **head_settings(config),
    ).eval()
    head.load_state_dict(load_file(state_path(study, repeat)))

    @torch.inference_mode()
    def logits(rows: IntArray) -> Tensor:
        parts = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            x = inputs.batch(rows[start : start + ROWS_AT_ONCE])
            # A head module reads maps [N, D, h, w]; places in one row are as good as in a square.
            parts.append(head(x.transpose(1, 2).unsqueeze(2) if head.spatial else x))
        return torch.cat(parts)

    def member() -> Member:
        return Member(
            encoder=build_backbone(study, request_of(config)),
            head=head,
            head_spec=_head_spec(repeat),
            pooling=config.pooling,
            blocks=config.blocks,
            feature_mean_D=inputs.mean_D,
            feature_std_D=inputs.deviation_D,
        )

    return Trained(logits=logits, member=member)


def _finetuned(own: Context, study: Context, repeat: Repeat) -> Trained:
    from safetensors.torch import load_file

    from core.encoding.pooling import num_head_features
    from core.head_settings import head_settings
    from core.heads import HEADS, build_head
    from core.models.classifier import PictureClassifier, picture_logits
    from core.models.served import Member

    config = repeat.config
    device = prepare_worker(study)
    encoder = build_backbone(study, request_of(config))
    head = build_head(
        num_features=num_head_features(
            encoder,
            spatial=HEADS[config.head].spatial,
            pooling=config.pooling,
            blocks=config.blocks,
        ),
        num_classes=own.table.num_classes,
        **head_settings(config),
    )
    model = PictureClassifier(encoder, head, pooling=config.pooling, blocks=config.blocks)
    model.load_state_dict(load_file(state_path(study, repeat)))
    pictures = open_matrix(repeat.candidate.features[PLAIN.name])

    def logits(rows: IntArray) -> Tensor:
        return picture_logits(
            model.to(device), pictures, rows, device, precision=study.precision
        ).cpu()

    def member() -> Member:
        model.cpu().eval()
        return Member(
            encoder=encoder,
            head=head,
            head_spec=_head_spec(repeat),
            pooling=config.pooling,
            blocks=config.blocks,
            feature_mean_D=model.mean_D,
            feature_std_D=model.deviation_D,
        )

    return Trained(logits=logits, member=member)


def _head_spec(repeat: Repeat) -> dict[str, Any]:
    from core.head_settings import head_settings

    return {k: v for k, v in head_settings(repeat.config).items() if k != "seed"}
