"""From what a person asked for to a study's record, its table and its split; nothing is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.data.split import Split, make_split
from core.data.table import Table, read_table
from core.encoding.encoders import build_encoder
from core.errors import InputError
from core.finetuning.drop_path import set_drop_path
from core.metrics import prior_scores
from core.probing.probe import METRICS

from .addresses import canonical, check_tracking
from .data import CheckedData, check_data, name_in
from .finalists.crown import AS_USUAL, FinalistOptions
from .goals.constraints import check_judgeable
from .home import Home
from .sampling.wilcoxon import check_folds
from .spaces.space import SearchSpace
from .studies.plan import feature_requests
from .studies.storage import stored_studies
from .studies.study import (
    StudyRecord,
    check_name,
    finetune_name,
    free_name,
    refuse_used_name,
)
from .studies.warm_start import NUM_TRIALS
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
    _check_backbones(request)
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


def _check_backbones(request: SearchRequest) -> None:
    """Build every encoder once: weights that are missing or do not fit are said at once, and
    stochastic depth where there is nothing to skip."""
    with_drop_path = {name for part in request.space.parts for name in _with_drop_path(part)}
    for backbone, size in sorted(
        {(r.backbone, r.image_size) for part in request.space.parts for r in feature_requests(part)}
    ):
        encoder = build_encoder(
            backbone,
            weights=request.weights,
            weights_dir=request.weights_dir,
            input_size=size or None,
        )
        if backbone in with_drop_path and not set_drop_path(encoder.network, 0.1):
            raise InputError(
                f"{backbone} has no blocks that can be skipped, so it has no drop_path",
                where=f"space {request.space.name}, drop_path",
                hint="add `when: {backbone: ...}` with backbones built for it, such as "
                "convnext_tiny",
            )


def _with_drop_path(space: SearchSpace) -> set[str]:
    """Backbones that some trial of the space has with a drop path above 0."""
    if "drop_path" not in space.parameters:
        return set()
    parameter = space.parameters["drop_path"]
    found = set()
    for values in space.assignments(["backbone", *parameter.parents()]):
        branch = parameter.active(values)
        if branch is not None and any(branch.domain.extremes()):
            found.add(str(values["backbone"]))
    return found


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
