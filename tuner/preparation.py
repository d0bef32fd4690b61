"""From what a person asked for to a study's record, its table and its split; nothing is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.data.split import Split, make_split
from core.data.table import Table, read_table
from core.errors import InputError
from core.metrics import prior_scores
from core.objectives import METRICS

from .addresses import canonical, check_tracking
from .backbones import check_backbones
from .data import CheckedData, check_data, name_in
from .finalists.crown import AS_USUAL, FinalistOptions
from .goals.constraints import check_judgeable
from .home import Home
from .sampling.wilcoxon import check_folds
from .spaces.space import SearchSpace
from .studies.parts import make_plans
from .studies.plan import Plan
from .studies.storage import stored_studies
from .studies.study import (
    StudyRecord,
    check_name,
    finetune_name,
    free_name,
    refuse_used_name,
)
from .studies.warm_start import NUM_TRIALS, WarmStart, warm_start_of
from .tracking.artifacts import artifact_url, check_artifacts
from .tracking.mlflow_store import tracked_studies
from .trials.cluster import LOCAL, ONE_WORKER, Share, check_address, check_share
from .views.steps import showing_steps

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What `tuner search` was asked for. None: the default that the field's line names."""

    space: SearchSpace
    data: dict[str, Any]
    """Arguments of `core.data.table.read_table`."""
    study: str | None = None
    """Name; None for the space's name and a number."""
    trials: int | None = None
    """Trials in all, of a two-part space those of its probe part; None for the space's."""
    finetune_trials: int | None = None
    """Trials of a two-part space's fine-tuning part; None for the space's."""
    hours: float | None = None
    """Time after which no cohort starts; None for no limit."""
    device_hours: float | None = None
    """Device time after which no cohort starts (`tuner.budgets.device_time`); None for no limit."""
    from_study: tuple[str, ...] = ()
    """Earlier studies, by name or folder, whose best trials are the first points."""
    from_trials: int = NUM_TRIALS
    """How many of their trials, of each part."""
    seed: int = 0
    address: str = LOCAL
    share: Share = ONE_WORKER
    """What a fine-tuning trial has of the cluster."""
    finalists: FinalistOptions = AS_USUAL
    """How the study ends."""
    storage: str | None = None
    """Optuna's URL; None for a journal file in the study's folder."""
    tracking_uri: str | None = None
    """MLflow's address; None for the store in the home folder."""
    artifacts: str | None = None
    """Where a new MLflow experiment keeps files; None for the home folder, or a server's own."""
    model: str | None = None
    """Registered model; None for the data folder's name."""
    weights: str = "auto"
    """`auto`: pretrained; `none`: random."""
    weights_dir: Path | None = None
    num_folds: int | None = None
    """Folds of the validation; None for one hold-out part."""
    skip_bad_images: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A study that could start now, and all that a dry run needs."""

    space: SearchSpace
    """With the points that earlier studies gave."""
    plans: tuple[Plan, Plan | None]
    warm: WarmStart | None
    record: StudyRecord
    table: Table
    split: Split


def prepare_search(request: SearchRequest, home: Home, console: Console) -> Prepared:
    """From a request to a study that could start: budgets, first points, and `prepare`.

    Raises InputError for anything that could not work.
    """
    plans = make_plans(
        request.space,
        trials=request.trials,
        finetune_trials=request.finetune_trials,
        hours=request.hours,
        device_hours=request.device_hours,
    )
    warm = warm_start_of(home, request.space, request.from_study, request.from_trials)
    if warm is not None:
        request = replace(request, space=warm.space)
    record, table, split = prepare(request, home, console)
    return Prepared(
        space=request.space, plans=plans, warm=warm, record=record, table=table, split=split
    )


def prepare(
    request: SearchRequest, home: Home, console: Console
) -> tuple[StudyRecord, Table, Split]:
    """Check everything, read the table, cut the split.

    Raises InputError for anything that could not work.
    """
    _check_options(request)
    two_parts = request.space.finetune is not None
    if request.study is not None:
        _refuse_used_names(home, request.study, two_parts=two_parts)
    table = read_table(**request.data, allow_missing=True)
    _check_classes(table, request.space.objective)
    model = request.model or table.name
    _check_model_name(model)
    tracking_uri = request.tracking_uri or home.tracking_uri
    check_tracking(tracking_uri)
    tracking_uri = canonical(tracking_uri)
    artifacts = None if request.artifacts is None else artifact_url(request.artifacts)
    check_artifacts(artifacts, tracking_uri=tracking_uri, experiment=model)
    check_address(request.address)
    elsewhere = stored_studies(request.storage) | tracked_studies(tracking_uri, model)
    name = request.study or free_name(home, request.space.name, elsewhere, two_parts=two_parts)
    _refuse_used_names(home, name, elsewhere, two_parts=two_parts)
    fingerprints = check_backbones(
        request.space, weights=request.weights, weights_dir=request.weights_dir
    )
    checked = check_with_progress(table, skip_bad=request.skip_bad_images, console=console)
    split = make_split(
        checked.table, seed=request.seed, num_folds=request.num_folds, groups=checked.groups
    )
    _check_validation(checked.table, split)
    check_judgeable(request.space, checked.table, split, request.finalists)
    record = StudyRecord(
        name=name,
        space=request.space.to_dict(),
        data={k: str(v) if isinstance(v, Path) else v for k, v in request.data.items()},
        skipped=tuple(name_in(table, problem.path) for problem in checked.problems),
        fingerprint=checked.table.fingerprint(),
        num_folds=request.num_folds,
        seed=request.seed,
        trials=request.trials or request.space.trials,
        finetune_trials=_finetune_trials(request),
        device_hours=request.device_hours,
        finalists=asdict(request.finalists),
        storage=None if request.storage is None else canonical(request.storage),
        tracking_uri=tracking_uri,
        artifacts=artifacts,
        model=model,
        weights=request.weights,
        weights_dir=str(request.weights_dir.resolve()) if request.weights_dir else None,
        weight_fingerprints=fingerprints,
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


def _refuse_used_names(
    home: Home, name: str, elsewhere: Collection[str] = (), *, two_parts: bool
) -> None:
    """Raises InputError if a study has the name, or that of its fine-tuning part."""
    refuse_used_name(home, name, elsewhere)
    if two_parts:
        check_name(finetune_name(name))
        refuse_used_name(home, finetune_name(name), elsewhere)


def _finetune_trials(request: SearchRequest) -> int | None:
    finetune = request.space.finetune
    return None if finetune is None else request.finetune_trials or finetune.trials


def _check_options(request: SearchRequest) -> None:
    """What is wrong with the flags alone."""
    check_share(request.share, finetunes=request.space.finetunes)
    if request.study is not None:
        check_name(request.study)
    for part in request.space.parts:
        check_folds(part, request.num_folds)
    if request.num_folds is not None:
        if request.space.finetunes:
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
