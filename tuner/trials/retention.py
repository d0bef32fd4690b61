"""Keeps the weights of a study's best fine-tuned trials, and deletes the rest as the study goes.

Bounded for the study, not for each trial: the disk holds KEPT states and the checkpoints of the
trials that run, however many have run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.report import Outcome, Status

from ..studies.outcomes import EndedTrial
from .context import Context

KEPT = 3
"""States kept: the winner's, and two that a person may want to compare it with."""


class StateKeeper:
    """A `Watcher` that deletes the checkpoints of every trial that has an end, and the state of
    every one that is not among the best.

    Args:
        context: knows where states are.
        earlier: trials that ended in earlier sessions.
    """

    def __init__(self, context: Context, earlier: Iterable[EndedTrial] = ()) -> None:
        self._context = context
        self._best: list[tuple[float, int]] = []
        for trial in earlier:
            self.trial_ended(trial.number, trial.settings, trial.outcome)

    def trial_started(self, number: int, settings: Mapping[str, Any]) -> None:
        """Nothing."""

    def cohort_progress(
        self, numbers: Sequence[int], epoch: int, values: Mapping[int, float]
    ) -> None:
        """Nothing."""

    def trial_ended(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        """Rank the trial; of equal values the earlier one is kept."""
        checkpoints = self._context.checkpoint_folder(number)
        if checkpoints.exists():
            shutil.rmtree(checkpoints)
        path = self._context.state_path(number)
        value = outcome.best_value if outcome.status is Status.COMPLETE else None
        if value is None or not path.exists():
            path.unlink(missing_ok=True)
            return
        self._best.append((-value, number))
        self._best.sort()
        for _, loser in self._best[KEPT:]:
            self._context.state_path(loser).unlink(missing_ok=True)
        del self._best[KEPT:]
