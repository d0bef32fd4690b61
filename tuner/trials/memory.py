"""The largest batch that a fine-tuning trial can have here, known before it starts.

How much memory a training step takes is measured once for each shape of step (backbone, picture
size, stages trained, device, and what else counts) and kept in the cache, where every worker and
every study finds it. What is free is asked each time. A trial that asks for more is infeasible:
its reason names the largest batch, and samplers learn from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.errors import InputError

from .context import Context, build_backbone, request_of

if TYPE_CHECKING:
    import torch

    from core.finetuning.memory import MemoryModel
    from core.finetuning.ranks import Ranks

FORMAT = 1
"""To be raised when what is kept changes."""
SETTINGS = (
    "backbone", "image_size", "unfrozen_stages", "batch_norm", "drop_path", "optimizer", "head",
    "hidden_sizes", "pooling", "blocks",
)  # fmt: skip
"""What decides how much memory a step takes. An average of the weights counts, its decay does
not."""


def too_big(
    context: Context, config: TrialConfig, *, device: torch.device, ranks: Ranks
) -> str | None:
    """Why the trial's batch does not fit, or None if it does. Every rank calls this, and hears the
    same: the rank with the least room decides."""
    import torch

    from core.finetuning.memory import largest_batch

    room = int(ranks.concat(torch.tensor([_room(context, device)])).min())
    model = memory_model(context, config, device=device, ranks=ranks)
    share = math.ceil(config.batch_size / ranks.count)
    most = 0 if model is None else largest_batch(model, room)
    if share <= most:
        return None
    size = f" at {config.image_size} px" if config.image_size else ""
    among = f" on {ranks.count} workers" if ranks.count > 1 else ""
    limit = f"at most {most * ranks.count} pictures fit" if most > 0 else "not one picture fits"
    return (
        f"a batch of {config.batch_size} does not fit in memory: {limit}{among} with "
        f"{config.backbone}{size} and {room / 1e9:.1f} GB for each worker"
    )


def memory_model(
    context: Context, config: TrialConfig, *, device: torch.device, ranks: Ranks
) -> MemoryModel | None:
    """What a step takes: from the cache, or measured by rank 0 while the others wait. None if
    even the small batches of the measurement did not fit."""
    from core.finetuning.memory import MemoryModel
    from core.finetuning.out_of_memory import is_out_of_memory
    from core.finetuning.step_memory import step_memory

    description = _description(context, config, device)
    path = _path(context.cache, description)
    mistake = None
    if ranks.rank == 0 and not path.exists():
        try:
            model = step_memory(
                build_backbone(context, request_of(config)),
                config,
                num_classes=context.table.num_classes,
                device=device,
                precision=context.precision,
            )
        except InputError as error:
            mistake = error  # The others wait for the word below.
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            _write(path, {"step": description, "model": dataclasses.asdict(model)})
    measured = ranks.agree(path.exists())
    if mistake is not None:
        raise mistake
    if not measured:
        return None
    return MemoryModel(**json.loads(path.read_text())["model"])


def _room(context: Context, device: torch.device) -> int:
    """Bytes that a worker may take: of what is free on its machine or GPU, its share."""
    import torch

    from core.finetuning.memory import available_memory

    if context.memory_bytes is not None:
        return context.memory_bytes
    room = available_memory(device)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return min(room, int(total * context.memory_share))
    return int(room * context.memory_share)


def _description(context: Context, config: TrialConfig, device: torch.device) -> dict[str, Any]:
    """A step's shape, as JSON."""
    import torch

    values = {name: getattr(config, name) for name in SETTINGS}
    values["hidden_sizes"] = list(config.hidden_sizes)
    return {
        **values,
        "format": FORMAT,
        "averaged": config.ema_decay > 0,
        "num_classes": context.table.num_classes,
        "precision": context.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


def _path(cache: Path, description: dict[str, Any]) -> Path:
    text = json.dumps(description, sort_keys=True)
    return cache / "memory" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _write(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all; of two that measure at once, the later one counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.part")
    draft.write_text(json.dumps(values, indent=1))
    draft.replace(path)
