"""What single things cost, for a quote: a picture through a backbone, a trial's epoch.

What this machine showed comes first (`tuner.budgets.calibration`); what nobody has measured is
taken from the nearest thing that was, with a wider range, and at last from a guess with a very wide
one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import TrialConfig

from ..spaces.space import SearchSpace
from ..studies.plan import Plan
from ..trials.context import FeatureRequest, request_of
from .calibration import NOTHING, Calibration, Estimate, within
from .speeds import epochs_key, feature_key, heads_prefix, training_key

RELATED_FACTOR = 2.0
"""For what only a related thing was measured of."""
UNKNOWN_FACTOR = 5.0
PICTURE_SECONDS, ROWS_SECONDS, TUNED_SECONDS = 0.03, 0.15, 60.0
"""Taken where nothing is known: a picture through a backbone; 1,000 rows of a head's epoch, and of
a fine-tuning's."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """A matrix that trials read, and how much of it there is."""

    request: FeatureRequest
    num_images: int
    num_cached: int
    """Pictures whose features are in the cache."""
    decodes: bool
    """Whether picture files must be read for the rest."""


def key_of(features: Features, device: str, precision: str) -> str:
    """The speed at which what lacks of a matrix is computed."""
    return feature_key(
        device,
        precision,
        features.request.label,
        decodes=features.decodes,
        num_pictures=features.num_images - features.num_cached,
    )


def feature_seconds(
    features: Features, device: str, precision: str, calibration: Calibration
) -> Estimate:
    """Of one worker for what lacks of a matrix."""
    missing = features.num_images - features.num_cached
    if not missing:
        return NOTHING
    each = calibration.number(key_of(features, device, precision))
    if each is not None:
        return each * missing
    prefix = f"features/{device}/{precision}/{features.request.label}/"
    related = _related([prefix, f"features/{device}/"], calibration)
    return (related or within(PICTURE_SECONDS, UNKNOWN_FACTOR)) * missing


def epochs_share(space: SearchSpace, plan: Plan, calibration: Calibration) -> Estimate:
    """Epochs that trials are trained for, over those they ask for: the pruner ends the others.

    Of successive halving it follows from its rungs, if one in `reduction_factor` passes each; a
    study in which the sampler gets better lets more of them pass.
    """
    known = calibration.number(epochs_key(space.pruner))
    if known is not None:
        return Estimate(low=known.low, value=known.value, high=min(1.0, known.high))
    if space.pruner.name == "none":
        return within(1.0, 1.0)
    if space.pruner.name != "successive_halving":
        return Estimate(low=0.3, value=0.6, high=1.0)
    factor = int(space.pruner.options.get("reduction_factor", 3))
    epochs, passed, last = 0.0, 1.0, 0
    for rung in (*plan.rungs, space.max_epochs):
        epochs, passed, last = epochs + passed * (rung - last), passed / factor, rung
    share = min(1.0, epochs / space.max_epochs)
    return Estimate(low=share / 1.2, value=share, high=min(1.0, share * 1.8))


def training_seconds(
    config: TrialConfig, device: str, precision: str, calibration: Calibration
) -> Estimate:
    """Seconds an epoch and 1,000 rows of one trial."""
    known = calibration.number(training_key(device, precision, config))
    if known is not None:
        return known
    if config.mode == "finetune":
        prefixes = [f"finetune/{device}/{precision}/{request_of(config).label}/",
                    f"finetune/{device}/"]  # fmt: skip
    else:
        prefixes = [heads_prefix(device, precision, request_of(config)), f"head/{device}/"]
    return _related(prefixes, calibration) or within(
        TUNED_SECONDS if config.mode == "finetune" else ROWS_SECONDS, UNKNOWN_FACTOR
    )


def _related(prefixes: Sequence[str], calibration: Calibration) -> Estimate | None:
    """The geometric mean of the nearest things that were measured; the range holds them all."""
    for prefix in prefixes:
        found = list(calibration.numbers(prefix).values())
        if found:
            mean = math.exp(sum(math.log(one.value) for one in found) / len(found))
            return Estimate(
                low=min(mean / RELATED_FACTOR, *(one.low for one in found)),
                value=mean,
                high=max(mean * RELATED_FACTOR, *(one.high for one in found)),
            )
    return None
