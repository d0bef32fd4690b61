"""The main job: from a space and a table to a registered model. Read `run` first.

    check -> study -> features -> rounds of cohorts -> finalists -> winner -> MLflow

What a person can get wrong is found before the first trial starts. The study's state is in
Optuna's storage; an interrupted study is taken up by running the same steps on it again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError
from core.precision import inference_precision
from core.split import Split
from core.table import Table

from .addresses import check_tracking
from .cache import holding, make_room, pruned_lines
from .cluster import LOCAL, Workers, check_address, cluster
from .context import Context
from .data import reread_table
from .extraction import extract
from .home import LIMIT_VARIABLE, Home
from .live import StudyView
from .plan import Plan, make_plan
from .preparation import SearchRequest, objective_floor, prepare
from .steps import ExtractionView, showing_steps
from .study import Study, create_study, stored_studies
from .tracking import Tracker
from .trials import run_trials
from .winner import Result, crown_and_register

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class SearchEnd:
    """How a search ended."""

    study: Study
    result: Result | None
    """The winner; None if the study was interrupted: `tuner resume` goes on."""
    floor: float
    """The objective that always answering the commonest classes reaches on validation."""


def search(request: SearchRequest, home: Home, console: Console) -> SearchEnd:
    """Run a new study to its end. Raises InputError for what cannot work, before it starts."""
    plan = make_plan(request.space, trials=request.trials, hours=request.hours)
    record, table, split = prepare(request, home, console)
    study = create_study(home, record)
    try:
        split.save(study.split_path)
        study.optuna(new=True)
    except BaseException:
        shutil.rmtree(study.folder)  # Nothing is in it yet, and it would block its name.
        raise
    try:
        return run(
            study, home, console, plan=plan, table=table, split=split, address=request.address
        )
    except InputError:
        if not study.optuna().get_trials(deepcopy=False):
            study.discard()
        raise


def resume(
    study: Study,
    home: Home,
    console: Console,
    *,
    trials: int | None = None,
    hours: float | None = None,
    address: str = LOCAL,
) -> SearchEnd:
    """Take up an interrupted study, or add trials to a finished one.

    Raises InputError if its data changed, or MLflow, Ray or the storage does not answer.
    """
    record = study.record
    plan = make_plan(study.space(), trials=record.trials if trials is None else trials, hours=hours)
    check_tracking(record.tracking_uri)
    stored_studies(record.storage)
    check_address(address)
    table = reread_table(dict(record.data), skipped=record.skipped, fingerprint=record.fingerprint)
    split = Split.load(study.split_path, table)
    return run(study, home, console, plan=plan, table=table, split=split, address=address)


def run(
    study: Study,
    home: Home,
    console: Console,
    *,
    plan: Plan,
    table: Table,
    split: Split,
    address: str,
) -> SearchEnd:
    """Features, trials, finalists, model; on an interruption, what is there is kept."""
    space = study.space()
    floor = objective_floor(space.objective, table, split)
    tracker = Tracker(
        study.record.tracking_uri,
        experiment=study.record.model,
        artifacts=home.artifacts,
        study=study.record.name,
        objective=space.objective,
        floor=floor,
    )
    view = StudyView(console, space, budget=plan.trials, floor=floor)
    result = None
    try:
        tracker.start_study(
            _study_params(study, table, split), [study.folder / "study.json", study.split_path]
        )
        view.announce(study.record.name, table, split)
        with cluster(address) as workers:
            context = _context(study, home, table, split, plan, workers)
            features = _extract(context, plan, workers, home, console)
            tracker.flush()
            with holding(features.values()):
                if run_trials(
                    study, space, context, plan, workers,
                    features=features, tracker=tracker, view=view,
                ):  # fmt: skip
                    result = crown_and_register(
                        study, space, context, workers, features, tracker, console
                    )
        tracker.end_study("FINISHED" if result else "KILLED")
    except KeyboardInterrupt:
        tracker.end_study("KILLED")
    except InputError:
        if not study.optuna().get_trials(deepcopy=False):
            tracker.withdraw_study()
        raise
    finally:
        tracker.close()
    return SearchEnd(study=study, result=result, floor=floor)


def _context(
    study: Study, home: Home, table: Table, split: Split, plan: Plan, workers: Workers
) -> Context:
    record = study.record
    return Context(
        study=record.name,
        table=table,
        split=split,
        pictures=table.picture_fingerprint(),
        objective=study.space().objective,
        seed=record.seed,
        cache=home.cache,
        folder=study.folder,
        weights=record.weights,
        weights_dir=Path(record.weights_dir) if record.weights_dir else None,
        rungs=plan.rungs,
        precision=inference_precision("cuda" if workers.gpus else "cpu"),
        num_threads=workers.num_threads,
    )


def _extract(
    context: Context, plan: Plan, workers: Workers, home: Home, console: Console
) -> dict[Any, str]:
    from .channel import start_channel

    pruned = make_room(
        home.cache,
        home.cache_limit,
        plan.requests,
        pictures=context.pictures,
        num_images=context.table.num_images,
    )
    if pruned is not None:
        console.print(f"making room in the cache ({LIMIT_VARIABLE}):", highlight=False)
        console.print("\n".join(f"  {line}" for line in pruned_lines(pruned)), highlight=False)
    with showing_steps(console) as steps:
        return extract(
            context,
            plan.requests,
            start_channel(),
            num_workers=workers.count,
            cpus_per_worker=workers.cpus,
            gpus_per_worker=workers.gpus,
            watch=ExtractionView(steps),
        )


def _study_params(study: Study, table: Table, split: Split) -> dict[str, Any]:
    record = study.record
    return {
        "space": record.space["name"],
        "mode": record.space["mode"],
        "sampler": record.space["sampler"]["name"],
        "pruner": record.space["pruner"]["name"],
        "objective": record.space["objective"],
        "seed": record.seed,
        "data": record.data["data"],
        "num_images": table.num_images,
        "num_classes": table.num_classes,
        "num_train": len(split.train),
        "num_validation": len(split.validation),
        "num_test": len(split.test),
        "num_folds": record.num_folds or 1,
        "weights": record.weights_dir or record.weights,
    }
