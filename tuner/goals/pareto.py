"""Which trials of a study with several objectives are worth a look: its Pareto front.

A trial is on the front if no complete one is better in one objective and at least as good in all
others. Scores are maximised, costs minimised. What is further back lies in layers: the front of
what is left when the layers before it are taken away. Values: one row a trial, higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.report import Status

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace
    from ..studies.study import TrialRecord


def layers(values: Sequence[Sequence[float]], *, enough: int | None = None) -> list[int]:
    """The layer of each row, the front's being 0; equal rows are in the same. Non-dominated
    sorting as in NSGA-II (Deb et al. 2002).

    `enough`: once that many rows have a layer, the others share the next one.
    """
    points_NM = np.asarray(values, np.float64)
    found = np.full(len(points_NM), -1)
    enough = len(points_NM) if enough is None else enough
    # Of rows in falling order, the first that is left is on the front.
    left = np.lexsort(-points_NM.T[::-1]) if len(points_NM) else np.arange(0)
    layer = 0
    while len(left) and len(points_NM) - len(left) < enough:
        on_front, rest = [], left
        while len(rest):
            first, rest = rest[0], rest[1:]
            on_front.append(first)
            equal = (points_NM[rest] == points_NM[first]).all(-1)
            rest = rest[(points_NM[rest] > points_NM[first]).any(-1) | equal]
        found[on_front] = layer
        left = left[~np.isin(left, on_front)]
        layer += 1
    found[left] = layer
    return [int(layer) for layer in found]


def front(trials: Sequence[TrialRecord], space: SearchSpace) -> list[TrialRecord]:
    """The trials on the front of a study, best first objective first; of equals, the earlier.
    Of one objective, the best trials."""
    return [trial for _, trial in joint_front([(space.name, trials)], space)]


def joint_front(
    parts: Sequence[tuple[str, Sequence[TrialRecord]]], space: SearchSpace
) -> list[tuple[str, TrialRecord]]:
    """The trials on the one front of several studies with the same objectives, each with its
    study's name, best first objective first; of equals, those of the earlier study.

    Args:
        parts: names and trials of the studies.
        space: of one of them.
    """
    complete = [
        (place, name, trial)
        for place, (name, trials) in enumerate(parts)
        for trial in trials
        if trial.status == Status.COMPLETE and trial.value is not None
    ]
    rows = layers([objectives_of(trial, space) for _, _, trial in complete])
    best = [one for one, layer in zip(complete, rows, strict=True) if layer == 0]
    best.sort(key=lambda one: (-(one[2].value or 0.0), one[0], one[2].number))
    return [(name, trial) for _, name, trial in best]


def objectives_of(trial: TrialRecord, space: SearchSpace) -> tuple[float, ...]:
    """A complete trial's objectives, higher being better: costs with their sign turned."""
    assert trial.value is not None
    return (trial.value, *(-trial.metrics[name] for name in space.minimised))
