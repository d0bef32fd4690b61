"""The training loop of fine-tuning: a head together with the last stages of its backbone.

One trial at a time, on one process or on several ranks (`core.finetuning.ranks`) that share each
batch. As for probes, a trial's value is its best epoch's validation objective, and the weights kept
are that epoch's. The number of ranks changes no sum, only what looks at a rank's own pictures:
dropout, drop path, mixing partners, training batch norms. A resumed run gives the numbers of one
that was never interrupted. B pictures of this rank's part of a batch, N of all, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from ..config import TrialConfig
from ..encoding.encoders import Encoder
from ..encoding.inputs import Rows
from ..errors import InputError
from ..head_settings import head_settings
from ..images.augment import Augmentation, mix, picture_seeds
from ..images.pixels import Pictures
from ..metrics import topk_recall
from ..models.classifier import SCALING, build_classifier, picture_logits, scale_features
from ..objectives import METRICS, further_metrics
from ..precision import FLOAT32
from ..report import Outcome, Report, Status
from .batches import Cut, cut_epoch, epoch_order, read_ahead, read_pictures, to_unit
from .checkpoint import Checkpoints
from .drop_path import set_drop_path
from .ema import AveragedWeights
from .out_of_memory import first_line, is_out_of_memory
from .param_groups import build_optimizer, parameter_groups
from .ranks import ALONE, Ranks
from .trained_network import TrainedNetwork
from .training_run import TrainingRun
from .training_state import Progress, TrainingState, seed_rank, share_buffers
from .unfreezing import num_unfrozen


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
    ranks: Ranks = ALONE,
    precision: str = FLOAT32,
    compile: bool = False,
    checkpoints: Checkpoints | None = None,
    head_state: Mapping[str, Tensor] | None = None,
    last_epoch: int | None = None,
) -> Outcome:
    """Train one trial's backbone stages and head on pictures. Every rank calls it alike.

    Args:
        encoder: changed in place.
        pictures: uint8 [N, S, S, 3]; may be memory-mapped.
        targets_NC: 0/1 targets, float32.
        report: rank 0's hears every epoch and says whether all ranks stop; after a resume the
            last epoch is told again, as nobody knows whether it was heard.
        objective: see `core.objectives.METRICS`.
        order_seed: the study's seed of the order of pictures.
        precision: of products and convolutions, see `core.precision`.
        compile: train through torch.compile; validation is not compiled.
        checkpoints: written by rank 0 after every epoch, before it is reported; if they hold a
            state of the same trial, training goes on from there. All ranks must see the folder.
        head_state: first weights of the head, see `core.models.classifier.build_classifier`.
        last_epoch: end after this epoch of the schedule, and keep its weights whatever validation
            says: for rows that it can say nothing about.

    Returns:
        The outcome, alike on all ranks; rank 0's has the best epoch's state of the whole
        `PictureClassifier`. INFEASIBLE if memory runs out on the only rank. With several ranks
        that is raised instead: the others wait for this one until its process ends.

    Raises:
        InputError: the backbone cannot be trained, the model cannot be compiled, the head's first
            weights are of another head, or a checkpoint cannot be written.
    """
    run = TrainingRun(
        pictures=pictures,
        targets_NC=targets_NC,
        train=train,
        validation=validation,
        config=config,
        objective=objective,
        order_seed=order_seed,
        device=torch.device(device),
        ranks=ranks,
        precision=precision,
        compile=compile,
        last_epoch=last_epoch,
    )
    devices = [run.device] if run.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(config.seed)
            state = build_state(run, encoder, head_state)
            resumed = checkpoints is not None and state.restore(checkpoints, run.trial, ranks)
            if not resumed:
                scaled = head_state is not None and set(SCALING) <= set(head_state)
                if config.feature_norm == "standardize" and not scaled:
                    scale_features(state.model, pictures, train, precision=precision, ranks=ranks)
                if ranks.rank:
                    seed_rank(config.seed, ranks)
            return _train(run, state, report, checkpoints, resumed=resumed)
    except (RuntimeError, MemoryError) as error:
        if ranks.count > 1 or not is_out_of_memory(error):
            raise
        return Outcome(
            status=Status.INFEASIBLE,
            reason=f"out of memory with batches of {config.batch_size}: {first_line(error)}",
        )


def build_state(
    run: TrainingRun, encoder: Encoder, head_state: Mapping[str, Tensor] | None
) -> TrainingState:
    """Model, optimizer and average before the first step."""
    config = run.config
    if config.unfrozen_stages != 0 and not encoder.stages():
        raise InputError(
            f"{encoder.backbone.name} has no layers that can be trained",
            where="unfrozen_stages",
            hint="use it with mode: probe",
        )
    if config.drop_path and not set_drop_path(encoder.network, config.drop_path):
        raise InputError(
            f"{encoder.backbone.name} has no blocks that can be skipped, but got "
            f"drop_path={config.drop_path}",
            where="drop_path",
            hint="leave it at 0, or take a backbone built for it, such as convnext_tiny",
        )
    model = build_classifier(
        encoder,
        head_settings(config),
        num_classes=run.targets_NC.shape[1],
        pooling=config.pooling,
        blocks=config.blocks,
        device=run.device,
        head_state=head_state,
    )
    stages = encoder.stages()
    most = num_unfrozen(config.unfrozen_stages, 0, num_stages=len(stages), epoch=1)
    groups = parameter_groups(
        stages[len(stages) - most :],
        model.head,
        lr=config.lr,
        layer_lr_decay=config.layer_lr_decay,
        head_lr_multiplier=config.head_lr_multiplier,
        weight_decay=config.weight_decay,
    )
    average = None
    if config.ema_decay:
        parameters = [p for group in groups for p in group["params"]]
        average = AveragedWeights(model, config.ema_decay, parameters)
    optimizer = build_optimizer(config.optimizer, groups, lr=config.lr, settings=vars(config))
    return TrainingState(model=model, optimizer=optimizer, average=average, device=run.device)


def _train(
    run: TrainingRun,
    state: TrainingState,
    report: Report,
    checkpoints: Checkpoints | None,
    *,
    resumed: bool,
) -> Outcome:
    """Epoch after epoch, until the last, a stop that is told, or numbers that are none."""
    config, ranks, progress = run.config, run.ranks, state.progress
    started = time.perf_counter() - progress.seconds

    def is_told_to_stop() -> bool:
        told = ranks.rank == 0 and report(progress.epoch, progress.curve[-1])
        return ranks.agree(told) and progress.epoch < run.num_epochs

    network = TrainedNetwork(
        state.model,
        drop_path=config.drop_path > 0,
        batch_norms=config.batch_norm == "train",
        precision=run.precision,
        compile=run.compile,
        ranks=ranks,
    )
    failure = ""
    # The epoch of the checkpoint is told again: it was written first, and perhaps not heard of.
    stopped = resumed and is_told_to_stop()
    while progress.epoch < run.num_epochs and not stopped:
        epoch = progress.epoch + 1
        trained = train_epoch(run, state, network, epoch)
        validated, logits_NC = _validate(run, state, network)
        metrics = {**trained, **validated, "lr": config.lr * float(run.rate_factors(epoch)[-1])}
        wrong = [
            f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)
        ]
        if wrong:
            failure = f"diverged in epoch {epoch}: {', '.join(wrong)}"
            break
        value = metrics[f"validation_{run.objective}"]
        newest, first = run.last_epoch is not None, ranks.rank == 0
        state.record(metrics, value, logits_NC, keep_state=first, newest=newest)
        progress.seconds = time.perf_counter() - started
        if checkpoints is not None:
            state.save(checkpoints, run.trial, ranks)
        stopped = is_told_to_stop()
    progress.seconds = time.perf_counter() - started
    return _outcome(run, progress, failure=failure, stopped=stopped)


def train_epoch(
    run: TrainingRun, state: TrainingState, network: TrainedNetwork, epoch: int
) -> dict[str, float]:
    """One pass over the training pictures; metrics are of the pictures as they were seen.

    A step's gradient is that of the mean loss of all its pictures, over however many batches and
    ranks they are spread.
    """
    ranks = run.ranks
    network.enter_epoch(run.num_unfrozen(epoch, network.num_stages))
    factors = run.rate_factors(epoch)
    losses, logits, targets = [], [], []
    for cut, images, targets_BC in _batches(run, epoch):
        with nullcontext() if cut.ends_step else network.keeping_gradients():
            logits_BC, losses_B = _forward(run, network, cut, images, targets_BC, epoch)
            own_losses = losses_B[: cut.num_own]
            # Gradients are averaged over ranks, so each counts as many times as there are ranks.
            loss = own_losses.sum() / (cut.step_pictures / ranks.count)
            loss.backward()  # type: ignore[no-untyped-call]
        if cut.ends_step:
            _step(run, state, float(factors[cut.step]))
        # Kept on the device: to ask for a number now would be to wait for it.
        losses.append(own_losses.detach().sum() / max(cut.num_own, 1))
        logits.append(logits_BC[: cut.num_own].detach())
        targets.append(targets_BC[: cut.num_own])
    means = torch.stack(losses).tolist()
    total = sum(mean * len(part) for mean, part in zip(means, targets, strict=True))
    total = float(ranks.sum(torch.tensor(total, dtype=torch.float64)))
    logits_NC, targets_NC = ranks.concat(torch.cat(logits)), ranks.concat(torch.cat(targets))
    return {
        "train_loss": total / len(targets_NC),
        "train_top3_accuracy": float(topk_recall(logits_NC, targets_NC, 3, allow_nan=True)),
    }


def _forward(
    run: TrainingRun,
    network: TrainedNetwork,
    cut: Cut,
    images_B3hw: Tensor,
    targets_BC: Tensor,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Logits and losses [B] of pictures that may each be mixed with another of this rank."""
    config = run.config
    if not (config.mixup_alpha or config.cutmix_alpha):
        logits_BC = network(images_B3hw)
        return logits_BC, run.losses(logits_BC, targets_BC)
    mixed = mix(
        images_B3hw,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        seed=[config.seed, epoch, cut.batch, run.ranks.rank],
    )
    logits_BC = network(mixed.images_BChw)
    own_B = run.losses(logits_BC, targets_BC)
    partner_B = run.losses(logits_BC, targets_BC[mixed.partners_B])
    return logits_BC, mixed.share_B * own_B + (1 - mixed.share_B) * partner_B


def _step(run: TrainingRun, state: TrainingState, rate_factor: float) -> None:
    """One step of the optimizer with the gradients that have come together."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * rate_factor
    if run.config.clip_norm is not None:
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, run.config.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.update()


def _batches(run: TrainingRun, epoch: int) -> Iterator[tuple[Cut, Tensor, Tensor]]:
    """This rank's part of each batch: float pictures, augmented, and their targets."""
    config, on_gpu = run.config, run.device.type == "cuda"
    order = epoch_order(run.train, order_seed=run.order_seed, epoch=epoch)
    cuts = cut_epoch(
        order,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        rank=run.ranks.rank,
        count=run.ranks.count,
    )
    augment = Augmentation(
        horizontal_flip=config.horizontal_flip,
        min_crop_scale=config.min_crop_scale,
        randaugment_magnitude=config.randaugment_magnitude,
        randaugment_ops=config.randaugment_ops,
    )

    def read(cut: Cut) -> tuple[Tensor, Tensor]:
        targets_BC = run.targets(cut.rows)
        targets_BC = targets_BC.pin_memory() if on_gpu else targets_BC
        return read_pictures(run.pictures, cut.rows, pin=on_gpu), targets_BC

    for cut, (pixels, targets_BC) in read_ahead(cuts, read):
        images = pixels.to(run.device, non_blocking=True).permute(0, 3, 1, 2)
        if augment != Augmentation():
            images = augment(images, picture_seeds(config.seed, epoch, cut.rows))
        yield cut, to_unit(images), targets_BC.to(run.device, non_blocking=True)


def _validate(
    run: TrainingRun, state: TrainingState, network: TrainedNetwork
) -> tuple[dict[str, float], Tensor]:
    """Metrics and logits of the validation pictures, with averaged weights if there are any."""
    if network.moves_buffers:
        share_buffers(state.model, run.ranks)
    with state.averaged():
        if network.moves_buffers:
            share_buffers(state.model, run.ranks)
        logits_NC = picture_logits(
            state.model,
            run.pictures,
            run.validation,
            run.device,
            precision=run.precision,
            ranks=run.ranks,
        )
    targets_NC = run.targets(run.validation).to(run.device)
    values = {"validation_loss": float(run.losses(logits_NC, targets_NC).mean())}
    for name in dict.fromkeys(("top3_accuracy", run.objective)):
        values[f"validation_{name}"] = float(METRICS[name](logits_NC, targets_NC, allow_nan=True))
    return values, logits_NC


def _outcome(run: TrainingRun, progress: Progress, *, failure: str, stopped: bool) -> Outcome:
    status, reason = Status.COMPLETE, ""
    if failure:
        status, reason = Status.FAILED, failure
    elif stopped:
        status, reason = Status.PRUNED, f"pruned at epoch {progress.epoch}"
    further: dict[str, float] = {}
    if status is Status.COMPLETE and progress.best_logits_NC is not None:
        further = further_metrics(progress.best_logits_NC, run.targets(run.validation))
    return Outcome(
        status=status,
        reason=reason,
        curve=tuple(progress.curve),
        best_epoch=progress.best_epoch,
        best_value=progress.best_value,
        best_metrics=further,
        seconds=progress.seconds,
        state=progress.best_state,
    )
