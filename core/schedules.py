"""Learning-rate schedules as pure functions: the factor on the peak rate at each step.

A function of the step (not an object with state), so that one call gives the factors of many heads
and a resumed run needs no schedule state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

ONE_CYCLE_START = 25.0
"""Peak rate over first rate, as in torch.optim.lr_scheduler.OneCycleLR."""
ONE_CYCLE_END = 1e4
"""First rate over last rate, as in OneCycleLR."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One way to change the learning rate over a run."""

    factor: Callable[[FloatArray, int, float], FloatArray]
    """(steps counted from 0, number of steps in the run >= 1, warm-up share) -> factors >= 0."""
    parameters: tuple[str, ...] = ()
    """Fields of `TrialConfig` it reads besides `lr`."""


def constant(steps: FloatArray, num_steps: int, warmup_fraction: float) -> FloatArray:
    """1 at every step."""
    return np.ones_like(steps, dtype=np.float64)


def cosine(steps: FloatArray, num_steps: int, warmup_fraction: float) -> FloatArray:
    """Linear rise over the warm-up, then half a cosine from 1 towards 0 (Loshchilov & Hutter 2017,
    without restarts). The first step is never 0; 0 would be reached one step after the last."""
    warmup = round(warmup_fraction * num_steps)
    rise = (steps + 1) / max(warmup, 1)
    progress = (steps - warmup) / max(num_steps - warmup, 1)
    return np.where(steps < warmup, rise, 0.5 * (1 + np.cos(np.pi * np.clip(progress, 0, 1))))


def one_cycle(steps: FloatArray, num_steps: int, warmup_fraction: float) -> FloatArray:
    """Cosine rise from 1/25 to 1, then cosine fall to 1/250,000 (Smith & Topin 2018, as
    torch.optim.lr_scheduler.OneCycleLR with its defaults; momentum is left alone)."""
    top = max(warmup_fraction * num_steps - 1, 1e-9)
    end = max(num_steps - 1, top + 1e-9)
    first = 1 / ONE_CYCLE_START
    last = first / ONE_CYCLE_END

    def anneal(start: float, stop: float, share: FloatArray) -> FloatArray:
        return stop + (start - stop) / 2 * (1 + np.cos(np.pi * np.clip(share, 0, 1)))

    return np.where(
        steps <= top,
        anneal(first, 1.0, steps / top),
        anneal(1.0, last, (steps - top) / (end - top)),
    )


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(factor=constant),
    "cosine": Schedule(factor=cosine, parameters=("warmup_fraction",)),
    "one_cycle": Schedule(factor=one_cycle, parameters=("warmup_fraction",)),
}


def rate_factors(name: str, *, num_steps: int, warmup_fraction: float) -> FloatArray:
    """The factors of a whole run, shape [num_steps]."""
    steps = np.arange(num_steps, dtype=np.float64)
    return SCHEDULES[name].factor(steps, num_steps, warmup_fraction)
