"""About how long heads train: to share them out evenly among processes.

Rough guesses for one core, which nobody promises to anyone: only their ratios count, and only
until an epoch has been timed. Where they are wrong a core waits, and nothing else changes.
"""

from __future__ import annotations

import itertools

from ..config import TrialConfig

SECONDS_A_STEP = 1e-4
"""Of the calls of a step, which a stack takes together, so that a head of many costs less."""
SECONDS_A_WEIGHT = 1e-9
"""Of updating it."""
SECONDS_A_PRODUCT = 2e-11
"""Of multiplying one picture's feature by it, there and back."""
DROPOUT_COST = 1.3
"""Drawing masks, by which the rest is multiplied."""


def seconds_of_epoch(
    config: TrialConfig, *, num_features: int, num_classes: int, num_rows: int
) -> float:
    """Of one head that passes once over the training rows."""
    widths = [num_features, *config.hidden_sizes, num_classes]
    weights = sum(inputs * outputs for inputs, outputs in itertools.pairwise(widths))
    step = weights * (SECONDS_A_WEIGHT + config.batch_size * SECONDS_A_PRODUCT)
    step *= DROPOUT_COST if config.dropout > 0 else 1.0
    return (SECONDS_A_STEP + step) * -(-num_rows // config.batch_size)
