"""What of a trial's settings makes its head. Models are served without it."""

from __future__ import annotations

from typing import Any

from .config import TrialConfig
from .heads import HEADS


def head_settings(config: TrialConfig) -> dict[str, Any]:
    """The arguments of `build_head` that a trial sets."""
    return {
        "kind": config.head,
        "seed": config.seed,
        **{key: getattr(config, key) for key in HEADS[config.head].parameters},
    }


def structure(config: TrialConfig) -> tuple[object, ...]:
    """What heads must share to be stacked."""
    return (config.head, config.hidden_sizes, config.dropout > 0 and config.head != "csra")
