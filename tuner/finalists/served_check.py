"""Whether the saved model answers, from picture files, as the one that was scored.

What was scored read features that were computed in the study's precision, and a served model
computes in float32. So both sides are compared in the study's precision: there they differ by the
order of sums alone, and any wrong weight, class or picture shows. How far float32 then is from
what was scored is a property of the network, not of what was saved: that is a number to be told.
N pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..trials.context import Context, prepare_worker

if TYPE_CHECKING:
    import torch
    from torch import nn

    from core.models.served import Classifier

SERVED_PICTURES = 8
"""Test pictures on which the saved model must answer as the trained one did."""
SERVED_TOLERANCE = 0.02
"""Largest difference of a probability in the same precision. On a CPU it is 1e-5 and less; a GPU
may add in another order for another number of pictures, which bfloat16 makes visible."""


def check_served(
    context: Context,
    folder: Path,
    *,
    tuned: Sequence[bool],
    probabilities_NC: npt.NDArray[Any],
) -> float:
    """The largest difference, on some test pictures, between the saved model as it is served and
    what was scored.

    Args:
        folder: the saved model.
        tuned: of each of its members, whether it was fine-tuned.
        probabilities_NC: what was scored, of the test rows in their order.

    Raises RuntimeError if they differ where both are computed alike.
    """
    from core.models.model import load_model

    rows = context.split.test[:SERVED_PICTURES]
    files = [context.table.paths[row] for row in rows]
    scored_NC = probabilities_NC[: len(rows)]
    device = prepare_worker(context)
    model = load_model(folder, device=device)
    with computed_as_trained(model, tuned, context.precision, device):
        difference = float(np.abs(model.predict(files) - scored_NC).max())
    if not difference <= SERVED_TOLERANCE:
        raise RuntimeError(
            f"the saved model differs from the trained one by {difference:.3f} on test pictures"
        )
    return float(np.abs(model.predict(files) - scored_NC).max())


@contextmanager
def computed_as_trained(
    model: Classifier, tuned: Sequence[bool], precision: str, device: torch.device
) -> Iterator[None]:
    """Within the block, a model computes what its trials computed, in their precision: a probe's
    backbone (its head is float32), a fine-tuned one's head, too."""
    with ExitStack() as stack:
        done: set[nn.Module] = set()
        for member, finetuned in zip(model.members, tuned, strict=True):
            # A probe reads maps from the cache, where they are kept in half precision.
            halved = member.spatial and not finetuned
            for module in [member.encoder, *([member.head] if finetuned else [])]:
                if module not in done:
                    stack.enter_context(_computed_in(module, precision, device, halved=halved))
                    done.add(module)
        yield


@contextmanager
def _computed_in(
    module: nn.Module, precision: str, device: torch.device, *, halved: bool
) -> Iterator[None]:
    """Within the block, calls of a module are computed in `precision`, and give float32."""
    from core.precision import autocast

    entered = ExitStack()

    def before(*_: Any) -> None:
        entered.enter_context(autocast(device, precision))

    def after(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        entered.close()
        return output.half().float() if halved else output.float()

    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        entered.close()
        for handle in handles:
            handle.remove()
