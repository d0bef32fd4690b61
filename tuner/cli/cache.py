"""`tuner cache`: what features and decoded pictures take on the disk, and making room."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from core.errors import InputError

from .options import home_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..features.cache import Store


@click.group()
def cache() -> None:
    """The cache of features and decoded pictures: list it, make room."""


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a store, a line each.")
def list_cache(as_json: bool) -> None:
    """List what is kept, the most recently used first."""
    from rich.console import Console

    from ..features.cache import list_stores, size_text

    home = home_of()
    stores = list_stores(home.cache)
    if as_json:
        for store in stores:
            click.echo(json.dumps(store.to_dict()))
        return
    _print_stores(stores, Console())
    limit = "" if home.cache_limit is None else f" of at most {size_text(home.cache_limit)}"
    total = size_text(sum(store.bytes for store in stores))
    click.echo(f"{len(stores)} stores, {total}{limit} in {home.cache}")


@cache.command("prune")
@click.option("--max-gb", type=float, help="Keep at most this much. Default: TUNER_CACHE_GB.")
@click.option("--all", "everything", is_flag=True, help="Keep nothing.")
@click.option("--older-than", metavar="DAYS", type=float, help="Keep what was used since.")
def prune_cache(max_gb: float | None, everything: bool, older_than: float | None) -> None:
    """Remove stores, least recently used first, and what kills left behind.

    What a running study uses stays. What is removed is computed again when it is needed.
    """
    from ..features.cache import GB, prune, pruned_lines

    home = home_of()
    if sum((max_gb is not None, everything, older_than is not None)) > 1:
        raise InputError("only one of --max-gb, --all and --older-than can be given")
    for flag, value in (("--max-gb", max_gb), ("--older-than", older_than)):
        if value is not None and not value >= 0:
            raise InputError(f"must be 0 or more, but got {value}", where=flag)
    max_bytes = 0 if everything else home.cache_limit if max_gb is None else int(max_gb * GB)
    if older_than is not None:
        max_bytes = None
    elif max_bytes is None:
        raise InputError(
            "how much is to be kept?", where="tuner cache prune",
            hint="give --max-gb, --older-than DAYS or --all, or set TUNER_CACHE_GB",
        )  # fmt: skip
    for line in pruned_lines(prune(home.cache, max_bytes=max_bytes, older_than_days=older_than)):
        click.echo(line)


def _print_stores(stores: list[Store], console: Console) -> None:
    from rich.table import Table

    from ..features.cache import size_text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("what", "pictures", "state", "size", "last used", "name"):
        number = column in ("pictures", "size")
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for store in stores:
        partly = f"{store.num_done:,}/{store.num_images:,}"
        state = "in use" if store.in_use else "complete" if store.complete else "partly"
        table.add_row(
            store.label,
            f"{store.num_images:,}" if store.complete else partly,
            state,
            size_text(store.bytes),
            store.age,
            store.folder.name[:8],
        )
    if stores:
        console.print(table)
