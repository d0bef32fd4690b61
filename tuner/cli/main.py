"""The command `tuner`. Each command reads its arguments and calls one function; imports wait
until a command runs, so that `tuner --help` answers at once.

Exit codes: 0 done; 1 an error of ours; 2 a mistake in what was handed in (`InputError`), said
without a traceback; 130 stopped by a person (SIGINT), 143 by a machine (SIGTERM), with the state
kept.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from core.errors import InputError

from ..signals import exit_code, interruption
from . import cache as cli_cache
from . import data as cli_data
from . import join as cli_join
from . import models as cli_models
from . import rerun as cli_rerun
from .options import (
    choice_options,
    data_options,
    finalist_arguments,
    finalist_options,
    home_of,
    table_arguments,
    worker_options,
)

SEED = click.IntRange(0, 2**31 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="poster-tuner")
def cli() -> None:
    """Find the best multi-label picture classifier for your pictures.

    \b
      tuner search probe --data DIR    search, compare, register the best
      tuner ui                         browse the trials in MLflow
      tuner predict MODEL_URI IMAGE    use the best
    """


@cli.command()
@click.argument("space")
@data_options
@click.option("--study", help="Name of the study. Default: the space's name and a number.")
@click.option(
    "--trials", type=int,
    help="Trials in all; of a two-part space, probes. Default: the space's.",
)  # fmt: skip
@click.option(
    "--finetune-trials", type=int,
    help="Trials of a two-part space's fine-tuning part. Default: the space's.",
)  # fmt: skip
@click.option(
    "--hours", type=float,
    help="Start no trial after this time; of a two-part space, no probe after half of it.",
)  # fmt: skip
@click.option(
    "--device-hours", type=float,
    help="Start no trial after devices were busy for so long; half of it for probes, as above.",
)  # fmt: skip
@click.option(
    "--from-study", metavar="NAME,NAME",
    help="Earlier studies (or their folders) whose best trials are tried first.",
)  # fmt: skip
@click.option(
    "--from-trials", type=int, default=10, show_default=True, help="How many of their trials.",
)  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seeds split and search.")
@click.option("--folds", type=int, help="Validate on this many folds instead of one part.")
@click.option(
    "--address", default="local", show_default=True,
    help="Ray: `local` (this machine), `auto`, or HOST:PORT of a cluster's head.",
)  # fmt: skip
@worker_options
@finalist_options
@click.option("--storage", help="Optuna's database URL. Default: a file in the study's folder.")
@click.option("--tracking-uri", help="MLflow's address. Default: a store in the home folder.")
@click.option(
    "--artifacts", metavar="URL",
    help="Where a new MLflow experiment keeps models: a folder, or s3://BUCKET/PREFIX.",
)  # fmt: skip
@click.option("--model", help="Name to register the winner under. Default: the data folder's.")
@click.option(
    "--weights", metavar="DIR|none",
    help="Folder of pretrained weights (NAME.pth), or `none` for random ones. "
         "Default: downloaded by torchvision and timm.",
)  # fmt: skip
@click.option("--skip-bad-images", is_flag=True, help="Leave damaged pictures out, with a list.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would run, and stop.")
def search(
    space: str,
    study: str | None,
    trials: int | None,
    finetune_trials: int | None,
    hours: float | None,
    device_hours: float | None,
    from_study: str | None,
    from_trials: int,
    seed: int,
    folds: int | None,
    address: str,
    workers_per_trial: int,
    gpus_per_worker: float | None,
    storage: str | None,
    tracking_uri: str | None,
    artifacts: str | None,
    model: str | None,
    weights: str | None,
    skip_bad_images: bool,
    dry_run: bool,
    **data: Any,
) -> None:
    """Search SPACE (a YAML file, or the name of a shipped one) for the best classifier of a table.

    Every trial is logged to MLflow; the winner is scored on the test split and registered.
    """
    from rich.console import Console

    from ..budgets.plan_view import print_plan
    from ..finalists.crown import FinalistOptions
    from ..preparation import SearchRequest
    from ..search import search as run_search
    from ..spaces.space import load_space
    from ..trials.cluster import Share
    from ..views.summary import print_end

    console = Console()
    finalists = FinalistOptions(**finalist_arguments(data))
    request = SearchRequest(
        space=load_space(space),
        data=table_arguments(data),
        study=study,
        trials=trials,
        finetune_trials=finetune_trials,
        hours=hours,
        device_hours=device_hours,
        from_study=tuple(filter(None, (from_study or "").split(","))),
        from_trials=from_trials,
        seed=seed,
        address=address,
        share=Share(workers=workers_per_trial, gpus=gpus_per_worker),
        finalists=finalists,
        storage=storage,
        tracking_uri=tracking_uri,
        artifacts=artifacts,
        model=model,
        weights="none" if weights == "none" else "auto",
        weights_dir=None if weights in (None, "none") else Path(str(weights)),
        num_folds=folds,
        skip_bad_images=skip_bad_images,
    )
    if dry_run:
        print_plan(request, home_of(), console)
        return
    end = run_search(request, home_of(), console)
    print_end(end, console)
    if end.stopped_by is not None and end.result is None:
        sys.exit(exit_code(end.stopped_by))


@cli.command()
@click.argument("study")
@click.option("--trials", type=int, help="New number of trials in all. Default: as before.")
@click.option("--finetune-trials", type=int, help="The same of a two-part study's second part.")
@click.option("--hours", type=float, help="Start no trial after this time.")
@click.option(
    "--device-hours", type=float, help="New device-hours of all sessions. Default: as before."
)
@click.option("--address", default="local", show_default=True, help="Ray: see `tuner search`.")
@worker_options
@finalist_options
@choice_options
def resume(
    study: str,
    trials: int | None,
    finetune_trials: int | None,
    hours: float | None,
    device_hours: float | None,
    address: str,
    workers_per_trial: int,
    gpus_per_worker: float | None,
    **finalists: Any,
) -> None:
    """Take up STUDY after an interruption, or add trials to it; both parts of a two-part one.

    Finished trials are kept; those that were running are run again under their own numbers.
    """
    from rich.console import Console

    from ..search import resume as resume_search
    from ..studies.study import open_study
    from ..trials.cluster import Share
    from ..views.summary import print_end

    console = Console()
    home = home_of()
    end = resume_search(
        open_study(home, study), home, console, trials=trials, finetune_trials=finetune_trials,
        hours=hours, device_hours=device_hours, address=address,
        share=Share(workers=workers_per_trial, gpus=gpus_per_worker),
        finalists=finalist_arguments(finalists),
    )  # fmt: skip
    print_end(end, console)
    if end.stopped_by is not None and end.result is None:
        sys.exit(exit_code(end.stopped_by))


@cli.command()
@click.argument("study")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a trial, a line each.")
def trials(study: str, as_json: bool) -> None:
    """List the trials of STUDY, best first; of a two-part study, its probes and then the others."""
    from rich.console import Console

    from ..studies.parts import studies_of
    from ..studies.study import open_study
    from ..views.summary import print_trials

    home = home_of()
    print_trials(studies_of(home, open_study(home, study)), Console(), as_json=as_json)


@cli.group()
def space() -> None:
    """Search spaces: list, show and check them."""


@space.command("list")
def space_list() -> None:
    """The spaces that come with the product."""
    from rich.console import Console

    from ..views.summary import print_spaces

    print_spaces(Console())


@space.command("show")
@click.argument("space")
def space_show(space: str) -> None:
    """Print a space's YAML: copy it to make your own."""
    from ..spaces.space import load_space, shipped_spaces

    load_space(space)
    click.echo(shipped_spaces().get(space, Path(space)).read_text(), nl=False)


@space.command("check")
@click.argument("space")
def space_check(space: str) -> None:
    """Check a space; says how many configurations it holds."""
    from ..goals.constraints import goals_text
    from ..spaces.space import load_space

    found = load_space(space)
    for part in found.parts:
        size = part.size()
        number = "endlessly many" if size is None else f"{size:,}"
        then = "" if part is found else f", then fine-tuning from {found.from_probes} probes"
        click.echo(
            f"{found.name}{then}: {len(part.parameters)} parameters, {number} configurations, "
            f"{part.trials} trials by {part.sampler.name}, pruned by {part.pruner.name}"
            + (f"; {goals_text(part)}" if goals_text(part) else "")
        )


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--tracking-uri", help="MLflow's store. Default: the one in the home folder.")
def ui(port: int, host: str, tracking_uri: str | None) -> None:
    """Open the MLflow UI on the studies of this machine."""
    from ..views.ui import serve_ui

    sys.exit(serve_ui(home_of(), host=host, port=port, tracking_uri=tracking_uri))


cli.add_command(cli_cache.cache)
cli.add_command(cli_data.data)
cli.add_command(cli_join.join)
cli.add_command(cli_models.predict)
cli.add_command(cli_models.evaluate)
cli.add_command(cli_rerun.rerun)


def main() -> None:
    """Entry point: mistakes of a person end with exit code 2 and no traceback."""
    # Read by MLflow when it is imported: bars of its own would garble ours.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        cli(standalone_mode=False)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as end:
        click.echo("stopped", err=True)
        # Click tells of an interruption by an exception of its own.
        sys.exit(exit_code(interruption(end.__cause__ or end) or signal.SIGINT))
