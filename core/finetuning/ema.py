"""An exponential moving average of the weights while they are trained (Polyak & Juditsky 1992).

torch's AveragedModel with its EMA rule, but only what training may change is kept twice, and the
model itself is evaluated with the averages in its place: no second model, whatever the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """Averages of some parameters and of the floating-point buffers of a model.

    Args:
        decay: share of the old average at each update; the first update copies.
        parameters: those that an optimizer changes, now or later.
    """

    def __init__(self, model: nn.Module, decay: float, parameters: Sequence[nn.Parameter]) -> None:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._live: list[Tensor] = [*(p.detach() for p in parameters), *buffers]
        self._averages = [tensor.clone() for tensor in self._live]
        self._average_into = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights of now into the average."""
        if self._num_updates == 0:
            torch._foreach_copy_(self._averages, self._live)
        else:
            self._average_into(self._averages, self._live, self._num_updates)
        self._num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` reads."""
        return {"averages": list(self._averages), "num_updates": self._num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of the same model."""
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
        self._num_updates = state["num_updates"]

    @torch.no_grad()
    def _swap(self) -> None:
        for average, live in zip(self._averages, self._live, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
