"""A fine-tuning trial on a worker: alone in a Tune trial's process, or as one rank of a group.

Whether its batch fits is asked before it starts. Weights of a complete trial go to
`context.state_path`, as they are big. A trial that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.errors import NoRoomError
from core.report import Outcome, Report, Status

from .cohort import save_state
from .context import Context, build_backbone, request_of

if TYPE_CHECKING:
    import torch

    from core.finetuning.ranks import Ranks
    from core.images.pixels import Pictures


def finetune_trial(
    context: Context,
    config: TrialConfig,
    number: int,
    pictures: Pictures,
    *,
    report: Report,
    device: torch.device,
    ranks: Ranks | None = None,
    last_epoch: int | None = None,
) -> Outcome:
    """Train one trial; every rank of a group calls this, and rank 0 reports and writes.

    Args:
        number: the trial's, which names its checkpoints and its state.
        pictures: uint8 squares of the whole table.
        ranks: None for a trial of one process.
        last_epoch: see `core.finetuning.finetune.finetune`.

    Raises InputError for a trial that cannot run, NoRoomError for a full disk: what was trained
    is in the last checkpoint then.
    """
    import torch

    from core.finetuning.checkpoint import Checkpoints
    from core.finetuning.finetune import finetune
    from core.finetuning.ranks import ALONE

    from .head_start import head_state_for
    from .memory import too_big

    ranks = ranks or ALONE
    reason = too_big(context, config, device=device, ranks=ranks)
    if reason is not None:
        return Outcome(status=Status.INFEASIBLE, reason=reason)
    ((train, validation),) = context.split.pairs()
    outcome = finetune(
        build_backbone(context, request_of(config)),
        pictures,
        torch.from_numpy(context.table.targets_NC).float(),
        train,
        validation,
        config,
        report=report,
        objective=context.objective,
        order_seed=context.seed,
        device=device,
        ranks=ranks,
        precision=context.precision,
        checkpoints=Checkpoints(context.checkpoint_folder(number)),
        head_state=head_state_for(context, config),
        last_epoch=last_epoch,
    )
    if outcome.state is not None and outcome.status is Status.COMPLETE:
        _keep_state(context.state_path(number), outcome.state)
    return dataclasses.replace(outcome, state=None)


def _keep_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the weights of a trial. Raises NoRoomError where there is no room for them."""
    from safetensors import SafetensorError

    from core.finetuning.checkpoint import num_bytes

    try:
        save_state(path, state)
    except (OSError, SafetensorError) as error:
        # safetensors makes a text of the system's error, so room is asked for.
        path.with_suffix(".part").unlink(missing_ok=True)
        needed, free = num_bytes(state), shutil.disk_usage(path.parent.parent).free
        if free >= needed:
            raise
        raise NoRoomError(
            f"no room for a trial's weights: they take {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free",
            where=str(path.parent),
            hint="free some room, or name a folder on another disk with TUNER_HOME; the trial "
            "goes on from its last checkpoint",
        ) from error
