"""`tuner data`: check one's own table, draw a synthetic one, fetch the public posters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import data_options, table_arguments


@click.group()
def data() -> None:
    """Tables of labelled pictures: check, draw, fetch."""


@data.command()
@data_options
@click.option("--skip-bad-images", is_flag=True, help="Report on the rest if some are damaged.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def check(skip_bad_images: bool, as_json: bool, **options: Any) -> None:
    """Read a table, decode every picture, and report what is in it."""
    from rich.console import Console

    from core.data.table import read_table
    from core.data.table_report import describe

    from ..preparation import check_with_progress
    from ..views.summary import print_table_report

    console = Console(stderr=True) if as_json else Console()
    table = read_table(**table_arguments(options), allow_missing=True)
    checked = check_with_progress(table, skip_bad=skip_bad_images, console=console)
    report = describe(checked.table, groups=checked.groups)
    if as_json:
        problems = [{"path": str(p.path), "reason": p.reason} for p in checked.problems]
        click.echo(json.dumps({**report.to_dict(), "left_out": problems}, indent=2))
        return
    print_table_report(report, console)


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=600, show_default=True, help="How many to draw.")
@click.option("--seed", type=int, default=0, show_default=True)
def synth(folder: Path, images: int, seed: int) -> None:
    """Draw film posters whose genres show in colours, layout, lettering and shapes."""
    from core.synth import draw_posters

    draw_posters(folder, num_images=images, seed=seed)
    click.echo(f"{images} posters and train.csv are in {folder}")


@data.command()
@click.argument("name", type=click.Choice(["posters"]))
@click.argument("folder", type=click.Path(path_type=Path), default=Path("posters"))
@click.option("--from", "source", metavar="PATH_OR_URL", help="A mirror: a zip, folder or URL.")
def fetch(name: str, folder: Path, source: str | None) -> None:
    """Download the public IMDB posters (Chu & Guo 2017) into FOLDER."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from core.data.fetch import PUBLIC_COUNTS, fetch_posters

    console = Console()
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        arguments = {} if source is None else {"source": source}
        counts = fetch_posters(folder, progress=show, **arguments)
    console.print(
        f"{counts.num_images:,} pictures and {counts.num_rows:,} rows of {counts.num_classes} "
        f"classes are in {folder}",
        highlight=False,
    )
    if counts != PUBLIC_COUNTS:
        console.print(
            f"[yellow]this is not the whole public set[/], which has "
            f"{PUBLIC_COUNTS.num_images:,} pictures and {PUBLIC_COUNTS.num_rows:,} rows",
            highlight=False,
        )
    console.print(f"next: tuner data check --data {folder}", highlight=False)
