"""A part of a search: its runs in MLflow, its features, its trials. A search has one or two."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError
from core.precision import inference_precision
from core.split import Split
from core.table import Table

from .cache import make_room, pruned_lines
from .cluster import Share, Workers
from .context import Context, FeatureRequest
from .extraction import extract
from .home import LIMIT_VARIABLE, Home
from .live import StudyView
from .parts import SEEDS_FILE
from .plan import Plan
from .space import SearchSpace
from .steps import ExtractionView, showing_steps
from .study import Study
from .tracking import Tracker
from .trials import run_trials

if TYPE_CHECKING:
    from rich.console import Console


SESSION_FILE = ".session"
"""In a study's folder: locked by the process that runs it."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the parts of a search share."""

    home: Home
    console: Console
    table: Table
    split: Split
    floor: float
    share: Share
    """What a fine-tuning trial has of the cluster."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a search whose trials have run."""

    study: Study
    space: SearchSpace
    context: Context
    features: Mapping[FeatureRequest, str]
    done: bool
    """Whether its budget is spent; False after an interruption."""


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """One session of a study at a time; the system ends the claim of a process that died.

    Raises InputError if another process runs the study."""
    with (study.folder / SESSION_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "another process runs this study now",
                where=f"study {study.record.name}",
                hint="wait for its end, or stop it (Ctrl-C keeps its trials)",
            ) from error
        yield


@contextmanager
def tracked(session: Session, study: Study) -> Iterator[Tracker]:
    """The runs of a study in MLflow; whatever happens, none is left RUNNING."""
    record = study.record
    tracker = Tracker(
        record.tracking_uri,
        experiment=record.model,
        artifacts=session.home.artifacts,
        study=record.name,
        objective=study.space().objective,
        floor=session.floor,
    )
    files = [study.folder / "study.json", study.split_path, study.folder / SEEDS_FILE]
    try:
        tracker.start_study(
            _study_params(study, session.table, session.split), [f for f in files if f.exists()]
        )
        yield tracker
    except KeyboardInterrupt:
        if not tracker.ended:
            tracker.end_study("KILLED")
        raise
    except InputError:
        if not study.optuna().get_trials(deepcopy=False):
            tracker.withdraw_study()
        raise
    finally:
        tracker.close()


@contextmanager
def trials_run(
    session: Session, study: Study, plan: Plan, workers: Workers, tracker: Tracker
) -> Iterator[Part]:
    """Features, then trials; the features are kept from being pruned while the block runs."""
    space = study.space()
    view = StudyView(session.console, space, budget=plan.trials, floor=session.floor)
    view.announce(study.record.name, session.table, session.split)
    context = _context(study, session.home, session.table, session.split, plan, workers)
    with ExitStack() as holds:
        features = _extract(context, plan, workers, session.home, session.console, holds)
        tracker.flush()
        done = run_trials(
            study, space, context, plan, workers,
            features=features, tracker=tracker, view=view, share=session.share,
        )  # fmt: skip
        yield Part(study=study, space=space, context=context, features=features, done=done)


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
        memory_bytes=home.memory_limit,
    )


def _extract(
    context: Context,
    plan: Plan,
    workers: Workers,
    home: Home,
    console: Console,
    holds: ExitStack,
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
            holds=holds,
        )


def _study_params(study: Study, table: Table, split: Split) -> dict[str, Any]:
    record, space = study.record, study.space()
    return {
        "space": space.name,
        "mode": space.mode,
        **({"after": record.after} if record.after else {}),
        "sampler": space.sampler.name,
        "pruner": space.pruner.name,
        "objective": space.objective,
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
