"""From what a person asked for to a study's record, its table and its split; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.errors import InputError
from core.metrics import prior_scores
from core.probe import METRICS
from core.split import Split, make_split
from core.table import Table

from .cluster import LOCAL
from .data import CheckedData, check_data
from .home import Home
from .space import SearchSpace
from .steps import showing_steps
from .study import StudyRecord, check_name, free_name, refuse_used_name
from .tracking import check_tracking

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What `tuner search` was asked for. None: the default that the field's line names."""

    space: SearchSpace
    data: dict[str, Any]
    """Arguments of `core.table.read_table`."""
    study: str | None = None
    """Name; None for the space's name and a number."""
    trials: int | None = None
    """Trials in all; None for the space's."""
    hours: float | None = None
    """Time after which no cohort starts; None for no limit."""
    seed: int = 0
    address: str = LOCAL
    storage: str | None = None
    """Optuna's URL; None for a journal file in the study's folder."""
    tracking_uri: str | None = None
    """MLflow's address; None for the store in the home folder."""
    model: str | None = None
    """Registered model; None for the data folder's name."""
    weights: str = "auto"
    """`auto`: pretrained; `none`: random."""
    weights_dir: Path | None = None
    num_folds: int | None = None
    """Folds of the validation; None for one hold-out part."""
    skip_bad_images: bool = False


def prepare(
    request: SearchRequest, home: Home, console: Console
) -> tuple[StudyRecord, Table, Split]:
    """Check everything, read the table, cut the split.

    Raises InputError for anything that could not work.
    """
    name = request.study or free_name(home, request.space.name)
    check_name(name)
    refuse_used_name(home, name)
    if request.num_folds and request.space.mode == "finetune":
        raise InputError("folds are for probes", where="--folds", hint="leave it out")
    if request.weights_dir is not None and not request.weights_dir.is_dir():
        raise InputError("there is no such folder", where=f"--weights {request.weights_dir}")
    tracking_uri = request.tracking_uri or home.tracking_uri
    check_tracking(tracking_uri)
    checked = check_with_progress(request.data, skip_bad=request.skip_bad_images, console=console)
    _check_classes(checked.table, request.space.objective)
    split = make_split(
        checked.table, seed=request.seed, num_folds=request.num_folds, groups=checked.groups
    )
    record = StudyRecord(
        name=name,
        space=request.space.to_dict(),
        data={k: str(v) if isinstance(v, Path) else v for k, v in request.data.items()},
        skipped=tuple(problem.path.name for problem in checked.problems),
        fingerprint=checked.table.fingerprint(),
        num_folds=request.num_folds,
        seed=request.seed,
        trials=request.trials or request.space.trials,
        storage=request.storage,
        tracking_uri=tracking_uri,
        model=request.model or checked.table.name,
        weights=request.weights,
        weights_dir=str(request.weights_dir.resolve()) if request.weights_dir else None,
    )
    return record, checked.table, split


def check_with_progress(
    arguments: dict[str, Any], *, skip_bad: bool, console: Console
) -> CheckedData:
    """`check_data` with bars, and a list of what was left out."""
    with showing_steps(console) as steps:
        checked = check_data(arguments, skip_bad=skip_bad, progress=steps)
    if checked.problems:
        console.print(f"[yellow]{len(checked.problems)} damaged pictures are left out:[/]")
        for problem in checked.problems[:SHOWN_PROBLEMS]:
            console.print(f"  {problem.path}: {problem.reason}", highlight=False, markup=False)
        if len(checked.problems) > SHOWN_PROBLEMS:
            console.print(f"  and {len(checked.problems) - SHOWN_PROBLEMS} more")
    return checked


def _check_classes(table: Table, objective: str) -> None:
    """Three predictions among three classes are always right, and among two impossible."""
    needed = 4 if objective == "top3_accuracy" else 3
    if table.num_classes < needed:
        raise InputError(
            f"{table.num_classes} classes are too few for {objective}",
            where=str(table.root),
            hint="it takes 4 classes; with 3, a space with objective: mean_average_precision",
        )


def objective_floor(objective: str, table: Table, split: Split) -> float:
    """The objective on validation of scoring every picture with the training frequencies: what
    a model reaches that never looks at a picture. The mean over folds."""
    targets_NC = torch.from_numpy(table.targets_NC)
    floors = []
    for train, validation in split.pairs():
        scores_C = prior_scores(targets_NC[train])
        scores_NC = scores_C.expand(len(validation), -1)
        floors.append(float(METRICS[objective](scores_NC, targets_NC[validation])))
    return sum(floors) / len(floors)
