"""How much memory the steps of a fine-tuning trial take, measured on its own training loop.

The same functions as `core.finetuning.finetune` build the model and train it, on pictures of noise,
so that whatever a setting costs is counted: stages trained, an average of the weights, slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ..config import TrialConfig
from ..encoding.encoders import Encoder
from .finetune import build_state, train_epoch
from .memory import MEASURED_BATCHES, MemoryModel, measure_memory
from .ranks import ALONE
from .trained_network import TrainedNetwork
from .training_run import TrainingRun


def step_memory(
    encoder: Encoder,
    config: TrialConfig,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
    precision: str,
) -> MemoryModel:
    """Peak memory of a step of `config` on one device, whatever its own batch size.

    Args:
        encoder: changed in place.

    Raises:
        InputError: the backbone cannot be trained.
        torch.OutOfMemoryError: not even a few pictures fit.
    """
    whole = dataclasses.replace(config, unfreeze_epochs=0, accumulation_steps=1)
    size, most = encoder.backbone.input_size, max(MEASURED_BATCHES)
    noise = np.random.default_rng(0)
    targets_NC = torch.zeros(most, num_classes)
    targets_NC[:, 0] = 1
    run = TrainingRun(
        pictures=noise.integers(0, 256, (most, size, size, 3), dtype=np.uint8),
        targets_NC=targets_NC,
        train=np.arange(most),
        validation=np.arange(1),
        config=whole,
        objective="top3_accuracy",
        order_seed=0,
        device=torch.device(device),
        ranks=ALONE,
        precision=precision,
        compile=False,
    )
    state = build_state(run, encoder, None)
    network = TrainedNetwork(
        state.model,
        drop_path=config.drop_path > 0,
        batch_norms=config.batch_norm == "train",
        precision=precision,
        compile=False,
        ranks=ALONE,
    )

    def run_step(num_pictures: int) -> None:
        step = dataclasses.replace(
            run,
            train=np.arange(num_pictures),
            config=dataclasses.replace(whole, batch_size=num_pictures),
        )
        train_epoch(step, state, network, epoch=1)

    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        model = measure_memory(
            run_step, resident=state.model.state_dict().values(), device=run.device
        )
    kept = 0
    if state.average is not None:
        groups = state.optimizer.param_groups
        kept += sum(p.nbytes for group in groups for p in group["params"])
    if run.device.type == "cpu":  # where the best epoch's state is kept
        kept += sum(tensor.nbytes for tensor in state.model.state_dict().values())
    return dataclasses.replace(
        model, fixed_bytes=model.fixed_bytes + kept, update_bytes=model.update_bytes + kept
    )
