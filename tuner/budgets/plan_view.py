"""`tuner search --dry-run`: what a search would do and what it would take. Nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from ..addresses import without_password
from ..goals.constraints import goals_text
from ..preparation import SearchRequest, prepare_search
from ..spaces.space import SearchSpace
from ..trials.cluster import LOCAL
from .quote_view import features_text, quote_rows
from .quoting import Subject, quote_of, this_machine

if TYPE_CHECKING:
    from rich.console import Console

    from ..home import Home
    from ..studies.plan import Plan
    from .quote import PartQuote

_PART_NAMES = {"probe": "probe part", "finetune": "fine-tuning part"}


def print_plan(request: SearchRequest, home: Home, console: Console) -> None:
    """Check everything, as a search does before it starts; then the plan, and the quote."""
    ready = prepare_search(request, home, console)
    record, table, split, warm = ready.record, ready.table, ready.split, ready.warm
    pairs = zip(ready.space.parts, ready.plans, strict=False)
    parts = [(space, plan) for space, plan in pairs if plan is not None]
    subject = Subject(
        home=home,
        table=table,
        split=split,
        parts=tuple((space, plan, 0) for space, plan in parts),
        options=request.finalists,
        weights=request.weights,
        weights_dir=request.weights_dir,
        workers=this_machine(),
        share=request.share,
    )
    with console.status("measuring how fast this machine is, where no study has shown it"):
        quote = quote_of(subject)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("study", record.name)
    lines.add_row("table", f"{table.num_images:,} pictures, {table.num_classes} classes")
    held_out = f"{len(split.train):,} train, {len(split.validation):,} validation"
    lines.add_row("split", f"{held_out}, {len(split.test):,} test")
    for (space, plan), quoted in zip(parts, quote.parts, strict=True):
        _add_part(lines, ready.space, space, plan, quoted)
    lines.add_row("MLflow", without_password(record.tracking_uri))
    lines.add_row("model", record.model)
    for name, text in quote_rows(quote):
        lines.add_row(name, text)
    console.print(lines, highlight=False)
    hints = [] if warm is None else warm.lines(table, split)
    if request.address != LOCAL:
        hints.append("times are those of this machine alone, not of the cluster")
    for hint in hints:
        console.print(hint, highlight=False, soft_wrap=True)
    console.print("nothing was started (--dry-run)")


def _add_part(
    lines: Table, whole: SearchSpace, space: SearchSpace, plan: Plan, quoted: PartQuote
) -> None:
    if len(whole.parts) > 1:
        seeded = "" if space is whole else f"first trials from the best {whole.from_probes} probes"
        lines.add_row(f"[bold]{_PART_NAMES[space.mode]}[/]", seeded)
    size = space.size()
    number = "endlessly many" if size is None else f"{size:,}"
    lines.add_row("trials", f"{plan.trials} of {number} configurations")
    lines.add_row("sampler", f"{space.sampler.name}, pruner {space.pruner.name}")
    if goals_text(space):
        lines.add_row("goals", goals_text(space))
    lines.add_row("features", "\n".join(features_text(*pair) for pair in quoted.features))
