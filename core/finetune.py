"""Training a head together with the last stages of its backbone, one trial at a time.

Normalisation layers stay in evaluation mode: their statistics are the pretrained ones, as small
batches of a small set would spoil them (and folded ones must not be re-estimated). As for probes,
a trial's value is its best epoch's validation objective, and the weights kept are that epoch's.
N pictures, B batch, C classes, D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import TrialConfig
from .encoders import Encoder
from .errors import InputError
from .features import MAP, encode
from .heads import HEADS, build_head
from .inputs import Rows, feature_statistics
from .losses import LOSSES, class_weights
from .metrics import topk_recall
from .optimizers import OPTIMIZERS
from .pixels import Pictures
from .pooling import num_head_features, pooled_features
from .probe import METRICS, further_metrics
from .report import Outcome, Report, Status
from .schedules import rate_factors
from .stack import head_settings

STATISTICS_ROWS = 1024
"""Training pictures whose features set the scaling in front of the head."""
EVALUATION_BATCH = 64


class PictureClassifier(nn.Module):
    """Encoder, pooling, feature scaling and head as one module: pictures to logits."""

    mean_D: Tensor
    deviation_D: Tensor

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        *,
        pooling: str,
        blocks: int = 1,
        mean_D: Tensor | None = None,
        deviation_D: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.pooling = pooling
        self.blocks = blocks
        self.spatial = bool(getattr(head, "spatial", False))
        size = num_head_features(encoder, spatial=self.spatial, pooling=pooling, blocks=blocks)
        self.register_buffer("mean_D", torch.zeros(size) if mean_D is None else mean_D)
        self.register_buffer(
            "deviation_D", torch.ones(size) if deviation_D is None else deviation_D
        )

    def forward(self, images_N3hw: Tensor) -> Tensor:
        """Float pictures [N, 3, S, S] in 0..1 to logits [N, C]."""
        mean, deviation = self.mean_D, self.deviation_D
        if self.spatial:
            features = self.encoder(images_N3hw)
            mean, deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
        else:
            features = pooled_features(
                self.encoder, images_N3hw, pooling=self.pooling, blocks=self.blocks
            )
        logits: Tensor = self.head((features - mean) / deviation)
        return logits


def finetune(
    encoder: Encoder,
    pictures: Pictures,
    targets_NC: Tensor,
    train: Rows,
    validation: Rows,
    config: TrialConfig,
    *,
    report: Report,
    objective: str = "top3_accuracy",
    order_seed: int = 0,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Train one trial's backbone stages and head on pictures.

    Args:
        encoder: changed in place.
        pictures: uint8 [N, S, S, 3]; may be memory-mapped.
        targets_NC: 0/1 targets, float32.
        report: hears every epoch and says whether to stop.
        objective: see `core.probe.METRICS`.

    Returns:
        The outcome, with the best epoch's state of the whole `PictureClassifier`.

    Raises:
        InputError: the backbone cannot be trained.
    """
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        model = _build(encoder, pictures, targets_NC.shape[1], train, config, device)
        return _train(
            model, pictures, targets_NC, train, validation, config, report, objective, order_seed
        )


def _train(
    model: PictureClassifier,
    pictures: Pictures,
    targets_NC: Tensor,
    train: Rows,
    validation: Rows,
    config: TrialConfig,
    report: Report,
    objective: str,
    order_seed: int,
) -> Outcome:
    device = model.mean_D.device
    optimizer = _optimizer(model, config)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    factors = rate_factors(
        config.schedule,
        num_steps=steps_per_epoch * config.epochs,
        warmup_fraction=config.warmup_fraction,
    )
    weights_C = class_weights(config.class_weights, targets_NC[torch.from_numpy(train)])
    weights_C = None if weights_C is None else weights_C.to(device)
    started = time.perf_counter()
    curve: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    status, reason = Status.COMPLETE, ""
    for epoch in range(1, config.epochs + 1):
        epoch_factors = factors[(epoch - 1) * steps_per_epoch : epoch * steps_per_epoch]
        batches = _batches(pictures, targets_NC, train, config, order_seed, epoch, device)
        metrics = {
            **_train_epoch(model, optimizer, batches, epoch_factors, config, weights_C),
            **_evaluate(model, pictures, targets_NC, validation, config, weights_C, objective),
            "lr": config.lr * float(epoch_factors[-1]),
        }
        wrong = [
            f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)
        ]
        if wrong:
            status, reason = Status.FAILED, f"diverged in epoch {epoch}: {', '.join(wrong)}"
            break
        curve.append(metrics)
        value = metrics[f"validation_{objective}"]
        if best is None or value > best[0]:
            state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            best = (value, epoch, state)
        if report(epoch, metrics) and epoch < config.epochs:
            status, reason = Status.PRUNED, f"pruned at epoch {epoch}"
            break
    further: dict[str, float] = {}
    if best is not None and status is Status.COMPLETE:
        model.load_state_dict(best[2])
        logits_NC = picture_logits(model, pictures, validation, device).cpu()
        further = further_metrics(logits_NC, targets_NC[torch.from_numpy(validation)])
    return Outcome(
        status=status,
        reason=reason,
        curve=tuple(curve),
        best_epoch=best[1] if best else None,
        best_value=best[0] if best else None,
        best_metrics=further,
        seconds=time.perf_counter() - started,
        state=best[2] if best else None,
    )


def _build(
    encoder: Encoder,
    pictures: Pictures,
    num_classes: int,
    train: Rows,
    config: TrialConfig,
    device: torch.device | str,
) -> PictureClassifier:
    if config.unfrozen_stages and not encoder.stages():
        raise InputError(
            f"{encoder.backbone.name} has no layers that can be trained",
            where="unfrozen_stages",
            hint="use it with mode: probe",
        )
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    unfrozen = encoder.stages()[-config.unfrozen_stages :] if config.unfrozen_stages else []
    for stage in unfrozen:
        for parameter in stage.parameters():
            parameter.requires_grad_(True)
    spatial = HEADS[config.head].spatial
    num_features = num_head_features(
        encoder, spatial=spatial, pooling=config.pooling, blocks=config.blocks
    )
    head = build_head(num_features=num_features, num_classes=num_classes, **head_settings(config))
    mean_D = deviation_D = None
    if config.feature_norm == "standardize":
        # The same sample for every trial: spread over the training rows, in order.
        sample = train[:: max(1, len(train) // STATISTICS_ROWS)][:STATISTICS_ROWS]
        parts = [
            encode(
                encoder,
                np.asarray(pictures[block]),
                pooling=MAP if spatial else config.pooling,
                blocks=config.blocks,
                device=device,
            ).cpu()
            for block in _blocks(sample, EVALUATION_BATCH)
        ]
        features = torch.cat(parts).numpy()
        mean_D, deviation_D = feature_statistics(features, np.arange(len(features)))
    model = PictureClassifier(
        encoder,
        head,
        pooling=config.pooling,
        blocks=config.blocks,
        mean_D=mean_D,
        deviation_D=deviation_D,
    )
    return model.to(device)


def _optimizer(model: PictureClassifier, config: TrialConfig) -> torch.optim.Optimizer:
    """Groups: backbone and head, each with and without weight decay (none on vectors: biases and
    norms). Each group's `peak` is the rate that the schedule's factor multiplies."""
    groups = []
    for part, multiplier in ((model.encoder, 1.0), (model.head, config.head_lr_multiplier)):
        params = [p for p in part.parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in params if (p.ndim > 1) == decayed]
            if chosen:
                decay = config.weight_decay if decayed else 0.0
                peak = config.lr * multiplier
                groups.append({"params": chosen, "weight_decay": decay, "peak": peak})
    kind = OPTIMIZERS[config.optimizer]
    settings = {key: getattr(config, key) for key in kind.parameters}
    return kind.build(groups, lr=config.lr, **settings)


def _train_epoch(
    model: PictureClassifier,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    factors: np.ndarray[Any, np.dtype[np.float64]],
    config: TrialConfig,
    weights_C: Tensor | None,
) -> dict[str, float]:
    """One pass over the batches; metrics over the pictures as they were seen while training."""
    model.encoder.eval()
    model.head.train()
    total_loss = 0.0
    logits, targets = [], []
    for (images, targets_BC), factor in zip(batches, factors, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        logits_BC = model(images)
        loss = _loss(config, logits_BC, targets_BC, weights_C).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total_loss += loss.item() * len(images)
        logits.append(logits_BC.detach())
        targets.append(targets_BC)
    targets_NC = torch.cat(targets)
    accuracy = topk_recall(torch.cat(logits), targets_NC, 3, allow_nan=True)
    return {
        "train_loss": total_loss / len(targets_NC),
        "train_top3_accuracy": float(accuracy),
    }


def _loss(
    config: TrialConfig, logits_BC: Tensor, targets_BC: Tensor, weights_C: Tensor | None
) -> Tensor:
    kind = LOSSES[config.loss]
    return kind.function(
        logits_BC,
        targets_BC,
        label_smoothing=config.label_smoothing,
        class_weights_C=weights_C,
        **{key: getattr(config, key) for key in kind.parameters},
    )


def _batches(
    pictures: Pictures,
    targets_NC: Tensor,
    train: Rows,
    config: TrialConfig,
    order_seed: int,
    epoch: int,
    device: torch.device | str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented float batches; the order is the study's, the flips the trial's."""
    order = np.random.default_rng([order_seed, epoch]).permutation(train)
    flips = np.random.default_rng([config.seed, epoch])
    for rows in _blocks(order, config.batch_size):
        images = _images(pictures, rows, device)
        if config.horizontal_flip:
            flip = torch.from_numpy(flips.random(len(rows)) < 0.5).to(images.device)
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        yield images, targets_NC[torch.from_numpy(rows)].to(device)


@torch.inference_mode()
def picture_logits(
    model: PictureClassifier, pictures: Pictures, rows: Rows, device: torch.device | str
) -> Tensor:
    """Logits [n, C] of some rows of uint8 pictures, in evaluation mode."""
    model.eval()
    blocks = _blocks(rows, EVALUATION_BATCH)
    return torch.cat([model(_images(pictures, block, device)) for block in blocks])


def _evaluate(
    model: PictureClassifier,
    pictures: Pictures,
    targets_NC: Tensor,
    rows: Rows,
    config: TrialConfig,
    weights_C: Tensor | None,
    objective: str,
) -> dict[str, float]:
    device = model.mean_D.device
    logits_NC = picture_logits(model, pictures, rows, device)
    targets = targets_NC[torch.from_numpy(rows)].to(device)
    values = {"validation_loss": float(_loss(config, logits_NC, targets, weights_C).mean())}
    for name in dict.fromkeys(("top3_accuracy", objective)):
        values[f"validation_{name}"] = float(METRICS[name](logits_NC, targets, allow_nan=True))
    return values


def _images(pictures: Pictures, rows: Rows, device: torch.device | str) -> Tensor:
    block = torch.from_numpy(np.ascontiguousarray(pictures[rows])).to(device)
    return block.permute(0, 3, 1, 2).float().div_(255)


def _blocks(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
