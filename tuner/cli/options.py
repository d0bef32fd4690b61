"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..home import Home

Command = TypeVar("Command", bound=Callable[..., Any])

_DATA_OPTIONS = (
    click.option("--data", required=True, metavar="DIR", help="Folder of a CSV and its pictures."),
    click.option("--csv", metavar="FILE", help="The CSV. Default: train.csv or the only one."),
    click.option("--images", metavar="DIR", help="Folder of the pictures. Default: Images."),
    click.option("--id-column", help="Column of ids or paths. Default: Id and the like."),
    click.option("--label-column", help="Column of delimited labels, in place of 0/1 columns."),
    click.option("--delimiter", help="What separates labels there. Default: found out."),
    click.option("--split-column", help="Column that says train, validation or test."),
)

_WORKER_OPTIONS = (
    click.option(
        "--workers-per-trial", type=int, default=1, show_default=True, metavar="W",
        help="Processes that train one fine-tuning trial together.",
    ),
    click.option(
        "--gpus-per-worker", type=float, metavar="G",
        help="GPUs of each, or a part of one if W is 1. Default: 1 where there are any.",
    ),
)  # fmt: skip


_FINALIST_OPTIONS = (
    click.option(
        "--finalists", type=int, metavar="K",
        help="The best K trials are trained again; the best mean wins. Default: 5.",
    ),
    click.option(
        "--seeds", type=int, metavar="R", help="New seeds of each finalist. Default: 3.",
    ),
    click.option(
        "--refit/--no-refit", default=None,
        help="Train what won once more, on training and validation pictures together.",
    ),
    click.option(
        "--ensemble", type=int, metavar="N",
        help="Average finalists, picked N times, where that beats the best of them.",
    ),
)  # fmt: skip


_CHOICE_OPTIONS = (
    click.option(
        "--pick", metavar="TRIAL",
        help="Register this trial's model, in place of the best: one of the Pareto front.",
    ),
    click.option(
        "--max-latency-ms", type=float, metavar="X",
        help="Register the best whose prediction of a picture takes at most X ms.",
    ),
    click.option(
        "--max-size-mb", type=float, metavar="X",
        help="Register the best whose saved model takes at most X MB.",
    ),
)  # fmt: skip


def worker_options(command: Command) -> Command:
    """The options that say what a fine-tuning trial has of the cluster."""
    for option in reversed(_WORKER_OPTIONS):
        command = option(command)
    return command


def finalist_options(command: Command) -> Command:
    """The options that say how a study ends; None where they were left out."""
    for option in reversed(_FINALIST_OPTIONS):
        command = option(command)
    return command


def choice_options(command: Command) -> Command:
    """The options that choose among the trials of a study; None where they were left out."""
    for option in reversed(_CHOICE_OPTIONS):
        command = option(command)
    return command


def finalist_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of `options` what `finalist_options` and `choice_options` gave, as arguments of
    `tuner.finalists.crown.FinalistOptions`."""
    names = {"finalists": "count", "seeds": "seeds", "refit": "refit", "ensemble": "ensemble"}
    names |= {name: name for name in ("pick", "max_latency_ms", "max_size_mb")}
    given = {argument: options.pop(name, None) for name, argument in names.items()}
    return {argument: value for argument, value in given.items() if value is not None}


def data_options(command: Command) -> Command:
    """The options that say where a table is and how it is laid out."""
    for option in reversed(_DATA_OPTIONS):
        command = option(command)
    return command


def table_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What `data_options` gave, as arguments of `core.data.table.read_table`; files become
    absolute, so that a study is found from any folder."""
    arguments: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    arguments["data"] = Path(arguments["data"]).expanduser().absolute()
    for key in ("csv", "images"):
        if key in arguments and Path(arguments[key]).exists():
            arguments[key] = Path(arguments[key]).absolute()
    return arguments


def home_of() -> Home:
    """The home folder of this installation."""
    from ..home import open_home

    return open_home()
