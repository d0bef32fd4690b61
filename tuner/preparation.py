"""From what a person asked for to a study's record, its table and its split; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.encoders import build_encoder
from core.errors import InputError
from core.metrics import prior_scores
from core.probe import METRICS
from core.split import Split, make_split
from core.table import Table, read_table

from .addresses import canonical, check_tracking
from .cluster import LOCAL, check_address
from .data import CheckedData, check_data, name_in
from .home import Home
from .plan import feature_requests
from .space import SearchSpace
from .steps import showing_steps
from .study import StudyRecord, check_name, free_name, refuse_used_name, stored_studies
from .tracking import tracked_studies

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
    _check_options(request)
    if request.study is not None:
        refuse_used_name(home, request.study)
    table = read_table(**request.data, allow_missing=True)
    _check_classes(table, request.space.objective)
    model = request.model or table.name
    _check_model_name(model)
    tracking_uri = request.tracking_uri or home.tracking_uri
    check_tracking(tracking_uri)
    tracking_uri = canonical(tracking_uri)
    check_address(request.address)
    elsewhere = stored_studies(request.storage) | tracked_studies(tracking_uri, model)
    name = request.study or free_name(home, request.space.name, elsewhere)
    refuse_used_name(home, name, elsewhere)
    _check_backbones(request)
    checked = check_with_progress(table, skip_bad=request.skip_bad_images, console=console)
    split = make_split(
        checked.table, seed=request.seed, num_folds=request.num_folds, groups=checked.groups
    )
    _check_validation(checked.table, split)
    record = StudyRecord(
        name=name,
        space=request.space.to_dict(),
        data={k: str(v) if isinstance(v, Path) else v for k, v in request.data.items()},
        skipped=tuple(name_in(table, problem.path) for problem in checked.problems),
        fingerprint=checked.table.fingerprint(),
        num_folds=request.num_folds,
        seed=request.seed,
        trials=request.trials or request.space.trials,
        storage=None if request.storage is None else canonical(request.storage),
        tracking_uri=tracking_uri,
        model=model,
        weights=request.weights,
        weights_dir=str(request.weights_dir.resolve()) if request.weights_dir else None,
    )
    return record, checked.table, split


def check_with_progress(table: Table, *, skip_bad: bool, console: Console) -> CheckedData:
    """`check_data` with bars, and a list of what was left out."""
    with showing_steps(console) as steps:
        checked = check_data(table, skip_bad=skip_bad, progress=steps)
    if checked.problems:
        console.print(f"[yellow]{len(checked.problems)} damaged pictures are left out:[/]")
        for problem in checked.problems[:SHOWN_PROBLEMS]:
            console.print(
                f"  {problem.path}: {problem.reason}", highlight=False, markup=False, soft_wrap=True
            )
        if len(checked.problems) > SHOWN_PROBLEMS:
            console.print(f"  and {len(checked.problems) - SHOWN_PROBLEMS} more")
    return checked


def _check_options(request: SearchRequest) -> None:
    """What is wrong with the flags alone."""
    if request.study is not None:
        check_name(request.study)
    if request.num_folds is not None:
        if request.space.mode == "finetune":
            raise InputError("folds are for probes", where="--folds", hint="leave it out")
        if request.num_folds < 2:
            raise InputError(
                f"at least 2 folds are needed, but got {request.num_folds}",
                where="--folds",
                hint="leave it out to validate on one part",
            )
    if request.weights_dir is not None and not request.weights_dir.is_dir():
        raise InputError(
            "there is no such folder",
            where=f"--weights {request.weights_dir}",
            hint="a folder of NAME.pth files, or `none` for random weights",
        )


def _check_model_name(name: str) -> None:
    """MLflow's rule for registered models, which it would tell at the very end."""
    if not name.strip() or set(name) & set("/:"):
        raise InputError(
            f"{name!r} cannot name a registered model",
            where="--model",
            hint="a name without / and :",
        )


def _check_backbones(request: SearchRequest) -> None:
    """Build every encoder once: weights that are missing or do not fit are said at once."""
    for backbone, size in sorted(
        {(r.backbone, r.image_size) for r in feature_requests(request.space)}
    ):
        build_encoder(
            backbone,
            weights=request.weights,
            weights_dir=request.weights_dir,
            input_size=size or None,
        )


def _check_classes(table: Table, objective: str) -> None:
    """Three predictions among three classes are always right, and among two impossible."""
    needed = 4 if objective == "top3_accuracy" else 3
    if table.num_classes < needed:
        raise InputError(
            f"{table.num_classes} classes are too few for {objective}",
            where=str(table.root),
            hint="it takes 4 classes; with 3, a space with objective: mean_average_precision",
        )


def _check_validation(table: Table, split: Split) -> None:
    """Nothing can be judged where no picture has a label; in a small table that can happen."""
    for number, (_, rows) in enumerate(split.pairs(), 1):
        if not table.targets_NC[rows].any():
            part = f"fold {number}" if split.folds else "the validation part"
            raise InputError(
                f"none of the {len(rows)} pictures in {part} has a label",
                where=str(table.root),
                hint="add pictures, use fewer folds, or try another seed",
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
