"""The main job: from a space and a table to a registered model. Read `run` first.

    check -> study -> features -> rounds of cohorts -> finalists -> winner -> MLflow

A space of two parts has the middle twice: probes, then fine-tuning that starts from the best.
What a person can get wrong is found before the first trial starts. The study's state is in
Optuna's storage; an interrupted study is taken up by running the same steps on it again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.data.split import Split
from core.data.table import Table
from core.errors import InputError

from .addresses import check_tracking
from .budgets.quoting import quoted
from .data import reread_table
from .drivers.presence import Driver, driving
from .finalists.choice import check_choice, chosen
from .finalists.crown import AS_USUAL, FinalistOptions
from .finalists.winner import Result, best_candidates, crown_and_register
from .goals.constraints import check_judgeable
from .home import Home
from .preparation import SearchRequest, objective_floor, prepare_search
from .session import Part, Session, tracked, trials_run
from .signals import going_on_with, interruption, stoppable
from .studies.parts import (
    begin_finetune_study,
    finetune_study,
    first_part,
    make_plans,
    studies_of,
)
from .studies.plan import Plan
from .studies.seeds import choose_seeds, seeds_text
from .studies.storage import stored_studies
from .studies.study import Study, create_study, trial_records
from .tracking.artifacts import check_artifacts
from .trials.cluster import LOCAL, ONE_WORKER, Share, Workers, check_address, check_share, cluster
from .trials.probe_heads import keep_heads

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
    finetune: Study | None = None
    """The fine-tuning part of a two-part study, if it has begun."""
    stopped_by: int | None = None
    """The signal that interrupted it; None if it came to its end."""


@stoppable()
def search(request: SearchRequest, home: Home, console: Console) -> SearchEnd:
    """Run a new study to its end. Raises InputError for what cannot work, before it starts."""
    ready = prepare_search(request, home, console)
    table, split = ready.table, ready.split
    study = create_study(home, ready.record)
    try:
        split.save(study.split_path)
        if ready.warm is not None:
            ready.warm.announce(study.folder, table, split, console)
        study.optuna(new=True)
    except BaseException:
        shutil.rmtree(study.folder)  # Nothing is in it yet, and it would block its name.
        raise
    try:
        return run(
            study, home, console, plans=ready.plans, table=table, split=split,
            address=request.address, share=request.share, options=request.finalists,
        )  # fmt: skip
    except InputError:
        if study.never_began():
            study.discard()
        raise


@stoppable()
def resume(
    study: Study,
    home: Home,
    console: Console,
    *,
    trials: int | None = None,
    finetune_trials: int | None = None,
    hours: float | None = None,
    device_hours: float | None = None,
    address: str = LOCAL,
    share: Share = ONE_WORKER,
    finalists: Mapping[str, Any] | None = None,
) -> SearchEnd:
    """Take up an interrupted study, or add trials to a finished one; both parts of a two-part one.

    `finalists` are arguments of `FinalistOptions` that differ from what the study began with.
    Raises InputError if its data changed, or MLflow, Ray or the storage does not answer.
    """
    record, space = first_part(study).record, study.space()
    options = FinalistOptions(**(record.finalists | dict(finalists or {})))
    check_choice(studies_of(home, study), options)
    check_share(share, finetunes=space.finetunes)
    plans = make_plans(
        space,
        trials=record.trials if trials is None else trials,
        finetune_trials=record.finetune_trials if finetune_trials is None else finetune_trials,
        hours=hours,
        device_hours=record.device_hours if device_hours is None else device_hours,
    )
    check_tracking(study.tracking_uri())
    check_artifacts(None, tracking_uri=study.tracking_uri(), experiment=record.model)
    stored_studies(study.storage_url())
    check_address(address)
    table = reread_table(dict(record.data), skipped=record.skipped, fingerprint=record.fingerprint)
    split = Split.load(study.split_path, table)
    check_judgeable(space, table, split, options)
    if trials is None and finetune_study(home, study) is not None:
        # The probe part is over, perhaps by the clock: its further trials would seed nothing.
        plans = replace(plans[0], trials=len(list(trial_records(study.optuna(), space)))), plans[1]
    return run(
        study, home, console, plans=plans, table=table, split=split, address=address, share=share,
        options=options,
    )  # fmt: skip


def run(
    study: Study,
    home: Home,
    console: Console,
    *,
    plans: tuple[Plan, Plan | None],
    table: Table,
    split: Split,
    address: str,
    share: Share = ONE_WORKER,
    options: FinalistOptions = AS_USUAL,
) -> SearchEnd:
    """Features, trials, finalists, model; on an interruption, what is there is kept.

    The probes of a two-part study are not scored by themselves: the best of them compete with the
    fine-tuned trials, and one winner sees the test split.
    """
    started = time.monotonic()
    floor = objective_floor(study.space().objective, table, split)
    session = Session(
        home=home, console=console, table=table, split=split, floor=floor, share=share
    )
    plan, finetune_plan = plans
    result = stopped_by = None
    going_on_with(f"tuner resume {study.record.name}")
    try:
        with (
            driving(study) as driver,
            tracked(session, study) as tracker,
            cluster(address) as workers,
            quoted(session, study, plans, workers, options, started),
        ):
            if session.share != ONE_WORKER:
                workers.for_trials(share)  # Refused now, and not after the probes.
            with trials_run(session, study, plan, workers, tracker, driver) as part:
                if part.done and finetune_plan is None:
                    result = crown_and_register(
                        study, part.space, part.context, workers, part.features, tracker, console,
                        options=options, share=share, meter=part.meter,
                    )  # fmt: skip
                tracker.end_study("FINISHED" if part.done else "KILLED")
                if part.done and finetune_plan is not None:
                    result = _finetune(session, part, finetune_plan, workers, options, driver)
    except BaseException as error:
        stopped_by = interruption(error)
        if stopped_by is None:
            raise
        if not isinstance(error, KeyboardInterrupt):
            console.print(f"while stopping: {error}", highlight=False, markup=False)
    finetune = finetune_study(home, study) if finetune_plan else None
    return SearchEnd(
        study=study, result=result, floor=floor, finetune=finetune, stopped_by=stopped_by
    )


def _finetune(
    session: Session,
    probes: Part,
    plan: Plan,
    workers: Workers,
    options: FinalistOptions,
    driver: Driver,
) -> Result | None:
    """The second part: seeded by the best probes, which compete with its trials at the end."""
    trials = tuple(trial_records(probes.study.optuna(), probes.space))
    study = finetune_study(session.home, probes.study)
    if study is None:
        seeds = choose_seeds(trials, probes.space)
        session.console.print(seeds_text(seeds), highlight=False, soft_wrap=True)
        study = begin_finetune_study(session.home, probes.study, seeds)
    with session.console.status("keeping the heads of the best probes"):
        without = keep_heads(
            study.folder, study.space(), trials, probes.features, probes.context, workers
        )
    if without:
        text = f"no complete probe, so these heads start at random: {'; '.join(without)}"
        session.console.print(text, highlight=False, soft_wrap=True)
    with (
        tracked(session, study) as tracker,
        trials_run(session, study, plan, workers, tracker, driver) as part,
    ):
        result = None
        if part.done:
            record = probes.study.record
            rivals = best_candidates(
                chosen(trials, record.name, options), probes.features, record.seed,
                study=record.name, count=options.count,
            )  # fmt: skip
            result = crown_and_register(
                study, part.space, part.context, workers, part.features, tracker,
                session.console, rivals=rivals, options=options, share=session.share,
                meter=part.meter,
            )  # fmt: skip
        tracker.end_study("FINISHED" if result else "KILLED")
    return result
