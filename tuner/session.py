"""A part of a search: its runs in MLflow, its features, its trials. A search has one or two."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core.data.split import Split
from core.data.table import Table
from core.errors import InputError

from .budgets.device_time import COSTS, FEATURES, DeviceMeter, devices_of_trial, open_meter
from .budgets.model_costs import notes_of_costs
from .budgets.speeds import (
    FeatureClock,
    device_name,
    keep_notes,
    notes_of_finalists,
    notes_of_trials,
    rows_an_epoch,
)
from .drivers.hardware import keep_hardware
from .drivers.presence import Driver
from .features.cache import make_room, pruned_lines
from .features.extraction import ExtractionProgress, extract
from .goals.costs import share_costs, unmeasured
from .goals.judge import Judge, affordable, judge_of
from .goals.pareto_view import record_front
from .home import LIMIT_VARIABLE, Home
from .signals import interruption
from .spaces.space import SearchSpace
from .studies import warm_start
from .studies.outcomes import OutcomeLog
from .studies.parts import SEEDS_FILE
from .studies.plan import Plan
from .studies.shared_record import publish_study
from .studies.study import Study, open_study
from .tracking.delivery import Delivery
from .tracking.tracker import Tracker, mlflow_delivery
from .trials.cluster import Share, Workers
from .trials.context import Context, FeatureRequest, context_of
from .trials.on_tune import run_trials
from .views.live import StudyView
from .views.steps import ExtractionView, showing_steps

if TYPE_CHECKING:
    from rich.console import Console


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

    @cached_property
    def delivery(self) -> Delivery:
        """Writes to MLflow of all parts, in one order: the second marks a winner of the first."""
        return mlflow_delivery(self.say)

    def say(self, line: str) -> None:
        if line:
            self.console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a search whose trials have run."""

    study: Study
    space: SearchSpace
    context: Context
    features: Mapping[FeatureRequest, str]
    meter: DeviceMeter
    """Counts what this session takes of devices for it."""
    done: bool
    """Whether its budget is spent; False after an interruption."""


@contextmanager
def tracked(session: Session, study: Study) -> Iterator[Tracker]:
    """The runs of a study in MLflow; whatever happens, none is left RUNNING."""
    record = study.record
    tracker = Tracker(
        study.tracking_uri(),
        experiment=record.model,
        artifacts=record.artifacts or session.home.artifacts,
        study=record.name,
        objective=study.space().objective,
        floor=session.floor,
        delivery=session.delivery,
    )
    files = [study.folder / "study.json", study.split_path]
    files += [study.folder / SEEDS_FILE, study.folder / warm_start.FILE]
    try:
        tracker.start_study(
            _study_params(study, session.table, session.split), [f for f in files if f.exists()]
        )
        yield tracker
        if tracker.ended == "FINISHED":
            tracker.flush()
        else:
            session.say(tracker.abandon("KILLED"))
    except BaseException as error:
        stopped = interruption(error) is not None
        if isinstance(error, InputError) and not stopped and study.never_began():
            tracker.withdraw_study()
        else:
            session.say(tracker.abandon("KILLED" if stopped else "FAILED"))
        raise
    finally:
        tracker.close()


@contextmanager
def trials_run(
    session: Session,
    study: Study,
    plan: Plan,
    workers: Workers,
    tracker: Tracker,
    driver: Driver | None = None,
) -> Iterator[Part]:
    """Features, then trials; the features are kept from being pruned while the block runs.
    `driver`: this process among those that run the study; None where there can be no other."""
    space = study.space()
    if driver is not None and not driver.joins:
        publish_study(study, session.split)
        if study.record.after is None:
            keep_hardware(study, space, workers)
    crew = workers.for_trials(session.share) if space.mode == "finetune" else workers
    meter, began = open_meter(study, session.home, crew, plan.device_seconds), time.time()
    view = StudyView(session.console, space, budget=plan.trials, floor=session.floor, meter=meter)
    view.announce(study.record.name, session.table, session.split)
    study.watch_storage(view)
    view.tracking_away = lambda: tracker.away
    context = context_of(
        study,
        session.home,
        session.table,
        session.split,
        rungs=plan.rungs,
        device_type="cuda" if workers.gpus else "cpu",
        num_threads=workers.num_threads,
    )
    judge = _judge(session, study, space, context, workers, meter)
    plan = affordable(plan, space, judge)
    with ExitStack() as holds:
        features = _extract(context, plan, workers, session.home, session.console, holds, meter)
        if meter.spent and study.never_began():
            raise meter.too_little()
        tracker.check_started()
        done = run_trials(
            study, space, context, plan, workers,
            features=features, tracker=tracker, view=view, share=session.share,
            driver=driver, judge=judge, meter=meter,
        )  # fmt: skip
        learned = notes_of_trials(
            meter.cohorts, OutcomeLog(study.folder).read(), workers=crew,
            precision=context.precision, rows=rows_an_epoch(session.split), mode=space.mode,
            pruner=space.pruner,
        )  # fmt: skip
        keep_notes(session.home, session.console, learned)
        if done and space.minimised and not (driver is not None and driver.joins):
            record_front(_up_to(study, session.home), space, tracker)
        yield Part(
            study=study, space=space, context=context, features=features, meter=meter, done=done
        )
        learned = notes_of_finalists(study.folder, began, meter, workers=crew, mode=space.mode)
        keep_notes(session.home, session.console, learned)


def _up_to(study: Study, home: Home) -> list[Study]:
    """A study, behind the one whose probes it goes on from, if it does."""
    if study.record.after is None:
        return [study]
    first = open_study(home, study.record.after)
    first.share_storage(study)
    return [first, study]


def _judge(
    session: Session,
    study: Study,
    space: SearchSpace,
    context: Context,
    workers: Workers,
    meter: DeviceMeter,
) -> Judge:
    """The study's judge. Measuring what models cost holds a worker, and teaches later quotes. What
    the probes' part measured is not measured again: the same model has one latency in both."""
    if space.costs:
        for earlier in _up_to(study, session.home)[:-1]:
            share_costs(earlier.optuna(), study.optuna(), space)
    missing = unmeasured(study.optuna(), space)
    if not missing:
        return judge_of(study, space, context, workers, session.console)
    started = time.monotonic()
    with meter.busy(COSTS, devices=devices_of_trial(workers)):
        judge = judge_of(study, space, context, workers, session.console)
    found = {shape: judge.costs[shape] for shape in missing}
    notes = notes_of_costs(device_name(workers), found, time.monotonic() - started)
    keep_notes(session.home, session.console, notes)
    return judge


def _extract(
    context: Context,
    plan: Plan,
    workers: Workers,
    home: Home,
    console: Console,
    holds: ExitStack,
    meter: DeviceMeter,
) -> dict[Any, str]:
    from .trials.channel import start_channel

    clock, started = FeatureClock(), time.monotonic()
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
    held = workers.count * devices_of_trial(workers)
    with showing_steps(console) as steps, meter.busy(FEATURES, devices=held):
        view = ExtractionView(steps)

        def watch(news: ExtractionProgress) -> None:
            view(news)
            clock(news)

        features = extract(
            context,
            plan.requests,
            start_channel(),
            num_workers=workers.count,
            cpus_per_worker=workers.cpus,
            gpus_per_worker=workers.gpus,
            watch=watch,
            holds=holds,
        )
    notes = clock.notes(device_name(workers), context.precision, time.monotonic() - started)
    keep_notes(home, console, notes)
    return features


def _study_params(study: Study, table: Table, split: Split) -> dict[str, Any]:
    record, space = study.record, study.space()
    return {
        "space": space.name,
        "mode": space.mode,
        **({"after": record.after} if record.after else {}),
        "sampler": space.sampler.name,
        "pruner": space.pruner.name,
        "objective": ", ".join((space.objective, *space.minimised)),
        **{f"constraint_{name}": bound for name, bound in space.constraints.items()},
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
