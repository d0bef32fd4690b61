"""`tuner rerun`: whether a trial's curve comes again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from .options import home_of

if TYPE_CHECKING:
    from rich.table import Table

    from ..trials.rerun import Rerun

SHOWN_DIGITS = 6


@click.command()
@click.argument("study")
@click.argument("trial", type=click.IntRange(min=0))
def rerun(study: str, trial: int) -> None:
    """Train TRIAL (a number) of STUDY again by itself and compare its curve with the recorded one.

    Exit code 0 if they are equal, bit for bit or within the tolerance that is printed, and 1 if
    not. Study and MLflow stay as they are. It is trained by one process on this machine.
    """
    from rich.console import Console

    from ..studies.study import open_study
    from ..trials.rerun import Verdict
    from ..trials.rerun import rerun as run
    from ..views.steps import showing_steps

    console = Console()
    home = home_of()
    with showing_steps(console) as steps:
        found = run(open_study(home, study), trial, home, steps)
    console.print(curve_table(found))
    console.print(verdict_text(found), highlight=False, soft_wrap=True)
    sys.exit(1 if found.verdict is Verdict.DIFFERENT else 0)


def curve_table(found: Rerun) -> Table:
    """Training loss and objective of each epoch, then and now."""
    from rich.table import Table

    objective = f"validation_{found.objective}"
    table = Table(header_style="bold", border_style="dim")
    table.add_column("epoch", justify="right")
    for name in ("train_loss", objective):
        table.add_column(f"{name} recorded", justify="right")
        table.add_column("again", justify="right")
    curves = found.trial.outcome.curve, found.again.curve
    for place in range(max(map(len, curves))):
        row = [str(place + 1)]
        for name in ("train_loss", objective):
            for curve in curves:
                value = curve[place].get(name) if place < len(curve) else None
                row.append("-" if value is None else f"{value:.{SHOWN_DIGITS}f}")
        table.add_row(*row)
    return table


def verdict_text(found: Rerun) -> str:
    """The end of the comparison, and what it was measured by."""
    from ..trials.rerun import LOSS_GROWTH, LOSS_MOST, LOSS_START, Verdict

    lines = [f"trial {found.trial.number}: {found.verdict.value}"]
    if found.reason:
        lines[0] += f": {found.reason}"
    for d in found.differences:
        lines.append(
            f"  {d.metric}: differs by {d.size:.1e} in epoch {d.epoch}, where {d.tolerance:.1e} "
            "is tolerated"
        )
    if found.verdict is not Verdict.BITWISE:
        lines.append(
            f"Tolerated is, of a loss, {LOSS_START:g} of it in the first epoch, {LOSS_GROWTH:g} "
            f"times as much in each further one, {LOSS_MOST:g} at most: a head in a stack is a "
            "part of bigger products, whose sums round otherwise, and training multiplies that."
        )
    if found.verdict is Verdict.DIFFERENT:
        lines.append(
            "If it was trained elsewhere: another kind of device, another number of threads or of "
            "--workers-per-trial changes sums, and several workers draw chance of their own."
        )
    return "\n".join(lines)
