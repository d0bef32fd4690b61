"""`tuner join`: a further process, here or on another machine, that runs a study's trials."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..signals import exit_code
from .options import home_of, worker_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..drivers.joining import JoinEnd
    from ..studies.study import Study


@click.command()
@click.argument("study")
@click.option("--storage", help="Database of the study, if it is not in this home.")
@click.option("--data", metavar="DIR", help="The same data here. Default: where they were there.")
@click.option(
    "--weights", metavar="DIR|none", help="The same weights here. Default: where they were there."
)
@click.option("--address", default="local", show_default=True, help="Ray: see `tuner search`.")
@worker_options
@click.option("--tracking-uri", help="The study's MLflow, as it is reached from here.")
def join(
    study: str,
    storage: str | None,
    data: str | None,
    weights: str | None,
    address: str,
    workers_per_trial: int,
    gpus_per_worker: float | None,
    tracking_uri: str | None,
) -> None:
    """Help with STUDY: run trials of its budget beside the process that began it.

    Works from any machine that reaches the study's database and MLflow and has the same pictures.
    Trials of a process that died are taken over. The winner is chosen where the study began.
    """
    from rich.console import Console

    from ..drivers.join_home import JoinFlags
    from ..drivers.joining import join as join_study
    from ..trials.cluster import Share

    console = Console()
    flags = JoinFlags(
        storage=storage,
        data=None if data is None else Path(data).expanduser().absolute(),
        weights=weights,
        tracking_uri=tracking_uri,
    )
    share = Share(workers=workers_per_trial, gpus=gpus_per_worker)
    end = join_study(study, home_of(), console, flags=flags, address=address, share=share)
    print_joined(end, console)
    if end.stopped_by is not None:
        sys.exit(exit_code(end.stopped_by))


def print_joined(end: JoinEnd, console: Console) -> None:
    """How many trials there are, the best of all drivers, and what comes next."""
    for part in end.parts:
        for line in part_lines(part):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    name = end.parts[0].record.name
    if end.stopped_by is not None:
        console.print(
            f"stopped: its running trials are left to the others. Go on with: tuner join {name}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    elif not end.led:
        console.print(
            f"The process that began the study is gone. For the winner: tuner resume {name}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def part_lines(part: Study) -> list[str]:
    """A study's counts and its best trial."""
    from ..studies.study import trial_records
    from ..views.live import percent, settings_line
    from ..views.summary import best_first

    space = part.space()
    trials = list(trial_records(part.optuna(), space))
    counts: dict[str, Any] = {}
    for trial in trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    shown = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"{part.record.name}: {len(trials)} trials: {shown}"]
    best = next((t for t in best_first(trials) if t.status == "complete"), None)
    if best is not None and best.value is not None:
        backbone = best.settings.get("backbone", "")
        lines.append(
            f"best: trial {best.number}, {space.objective} {percent(best.value)}, "
            f"{backbone}, {settings_line(best.settings)}"
        )
    return lines
