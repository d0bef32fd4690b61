"""Ensembles of classifiers: which members, how often each, and what they say together.

Greedy forward selection with replacement (Caruana, Niculescu-Mizil, Crew & Ksikes, "Ensemble
selection from libraries of models", ICML 2004), without their sorted start and bagging: libraries
here are a handful of finalists. Members are averaged as probabilities, each calibrated by itself
first, since a model trained by cross entropy and one trained by BCE mean different things by a
logit. Imports nothing of training: this file travels in every served model.
S seeds, M members, N pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""(scores [H, N, C], targets [N, C]) -> [H], higher is better: an entry of
`core.objectives.METRICS`."""
LEAST_PROBABILITY = 1e-7
"""Probabilities this near to 0 and 1 become logits of 16: float32 holds nothing beyond."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What greedy selection came to."""

    picks: tuple[int, ...]
    """Members in the order in which they were picked; a member may stand there several times."""
    weights: tuple[float, ...]
    """Share of the picks of each member of the library; they sum to 1."""
    value: float
    """The objective of the weighted mean, on the pictures that chose it: it flatters itself."""


def select_members(
    probs_MNC: Tensor, targets_NC: Tensor, *, objective: Objective, num_picks: int
) -> Selection:
    """Pick a member at a time, each time the one whose addition makes the mean best.

    As in the paper, of the ensembles along the way the best is returned: of equals the smallest.
    Of members that do equally well, the first of the library is picked.

    Args:
        probs_MNC: each member's probabilities on the pictures that are to choose.
        targets_NC: their 0/1 targets.
        objective: what is to be high.
        num_picks: picks in all, >= 1; the granularity of the weights.

    Raises:
        ValueError: an empty library, no pick, or probabilities outside 0..1.
    """
    if num_picks < 1 or not len(probs_MNC):
        raise ValueError(f"num_picks >= 1 and a member must hold, got {num_picks=}")
    probs = probs_MNC.double()
    if not bool(((probs >= 0) & (probs <= 1)).all()):
        raise ValueError("probabilities must be in 0..1")
    total_NC = torch.zeros_like(probs[0])
    picks: list[int] = []
    best: tuple[float, int] | None = None
    for count in range(1, num_picks + 1):
        values_M = objective((total_NC + probs) / count, targets_NC)
        pick = int(values_M.argmax())  # the first of equals
        picks.append(pick)
        total_NC = total_NC + probs[pick]
        value = float(values_M[pick])
        if best is None or value > best[0]:
            best = (value, count)
    assert best is not None
    kept = picks[: best[1]]
    weights = tuple(kept.count(member) / len(kept) for member in range(len(probs)))
    return Selection(picks=tuple(kept), weights=weights, value=best[0])


@dataclass(frozen=True, kw_only=True)
class SeededSelection:
    """A selection, and what its members score under seeds that had no say in it."""

    selection: Selection
    seed: int
    """Which training of the members picked them: the one to keep."""
    estimate: float
    """Mean over all seeds: weights picked by one training of every member, scored on its other
    trainings. Free of what greedy selection gains by suiting the very models it picks; the
    pictures are the same, as they are for the mean of a single finalist."""


def select_over_seeds(
    probs_SMNC: Tensor, targets_NC: Tensor, *, objective: Objective, num_picks: int
) -> SeededSelection:
    """`select_members` once a seed; of the selections, the one that other seeds like best.

    Args:
        probs_SMNC: probabilities of each member under each of S >= 2 seeds.
        targets_NC, objective, num_picks: as for `select_members`.

    Raises:
        ValueError: fewer than two seeds, or what `select_members` refuses.
    """
    num_seeds = len(probs_SMNC)
    if num_seeds < 2:
        raise ValueError(f"two seeds are needed, so that one can judge the other, got {num_seeds}")
    selections, estimates = [], []
    for seed, probs_MNC in enumerate(probs_SMNC):
        selection = select_members(probs_MNC, targets_NC, objective=objective, num_picks=num_picks)
        weights = torch.tensor(selection.weights, dtype=torch.float64)
        others = [other for other in range(num_seeds) if other != seed]
        mean_TNC = torch.einsum("m,tmnc->tnc", weights, probs_SMNC[others].double())
        selections.append(selection)
        estimates.append(float(objective(mean_TNC, targets_NC).double().mean()))
    best = max(range(num_seeds), key=lambda seed: estimates[seed])
    return SeededSelection(
        selection=selections[best], seed=best, estimate=sum(estimates) / num_seeds
    )


def mean_logits(
    logits: Sequence[Tensor],
    *,
    calibrations: Sequence[tuple[float, float]],
    weights: Sequence[float],
) -> Tensor:
    """The logit of the weighted mean of the members' calibrated probabilities, [N, C].

    A member's probability is sigmoid(scale * logit + bias). Selection, scoring and serving all go
    through here, so that they cannot differ.
    """
    mean_NC = torch.zeros_like(logits[0], dtype=torch.float32)
    for logits_NC, (scale, bias), weight in zip(logits, calibrations, weights, strict=True):
        mean_NC = mean_NC + weight * torch.sigmoid(logits_NC.float() * scale + bias)
    return torch.logit(mean_NC, eps=LEAST_PROBABILITY)
