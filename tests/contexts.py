"""A small `Context`, which is what the workers of a study share, and tables of drawn pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from core.data.split import Split, make_split
from core.data.table import Table, read_table
from core.precision import FLOAT32
from core.synth import draw_posters
from tuner.trials.context import Context


def drawn_table(
    folder: Path, num_images: int, size: tuple[int, int] = (48, 64), *, name: str = "drawn"
) -> Table:
    """Of so many pictures, drawn in a new folder of that name."""
    draw_posters(folder / name, num_images=num_images, size=size)
    return read_table(folder / name)


def small_context(
    table: Table, root: Path, *, split: Split | None = None, **changes: Any
) -> Context:
    """Of a study `s`: float32 on one thread, random weights, no rungs; its cache and its folder
    are in `root`. `split`: None to take no two pictures for the same."""
    context = Context(
        study="s",
        table=table,
        split=split or make_split(table, groups=range(table.num_images)),
        pictures="abc",
        objective="top3_accuracy",
        seed=0,
        cache=root / "cache",
        folder=root / "study",
        weights="none",
        weights_dir=None,
        rungs=(),
        precision=FLOAT32,
        num_threads=1,
    )
    return dataclasses.replace(context, **changes)
