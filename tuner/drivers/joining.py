"""Joining a study: a further process that runs its trials, here or in another home.

The first driver (search, resume) prepares the study and ends it: points to begin with, the second
part, finalists, the winner. A joiner asks for trials within the first one's budget until all have
ended, and goes on alone if the first one dies. In a home of its own it rebuilds the study from what
the first one published, and runs nothing unless table, split and weights are the same, and where
latency counts the hardware, too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import InputError

from ..addresses import check_tracking, without_password
from ..home import Home
from ..preparation import objective_floor
from ..session import Part, Session, trials_run
from ..signals import going_on_with, interruption, stoppable
from ..studies.parts import make_plans
from ..studies.plan import Plan
from ..studies.study import Study, trial_records
from ..tracking.mlflow_store import tracked_studies
from ..tracking.tracker import Tracker
from ..trials.cluster import LOCAL, ONE_WORKER, Share, Workers, check_address, check_share, cluster
from ..trials.probe_heads import keep_heads
from .hardware import check_hardware
from .join_home import JoinFlags, second_part, study_here
from .presence import Driver, driving
from .turns import SharedBudget, published_budget

if TYPE_CHECKING:
    from rich.console import Console

WAIT_SECONDS = 1.0
"""Between two looks at whether the first driver has begun a part."""


@dataclass(frozen=True, kw_only=True)
class JoinEnd:
    """How joining a study ended."""

    parts: tuple[Study, ...]
    """The study, and its fine-tuning part if that was joined, too."""
    led: bool
    """Whether a first driver was still there, which goes on to the winner."""
    stopped_by: int | None
    """The signal that interrupted it; None if all trials have ended."""


@stoppable()
def join(
    name: str,
    home: Home,
    console: Console,
    *,
    flags: JoinFlags,
    address: str = LOCAL,
    share: Share = ONE_WORKER,
) -> JoinEnd:
    """Run trials of the study `name` until its budget is spent and all trials have ended.

    Raises InputError for what cannot work: no such study, other data, another split, other weights
    or hardware, an MLflow or a Ray that does not answer.
    """
    check_address(address)
    study, table, split = study_here(name, home, console, flags)
    space = study.space()
    check_share(share, finetunes=space.finetunes)
    check_tracking(study.tracking_uri())
    session = Session(
        home=home, console=console, table=table, split=split, share=share,
        floor=objective_floor(space.objective, table, split),
    )  # fmt: skip
    parts, stopped_by, led = [study], None, False
    going_on_with(f"tuner join {name}")
    try:
        with driving(study, joins=True) as driver:
            plan, finetune_plan = make_plans(space)
            plan = _within(plan, _first_budget(study, driver))
            with cluster(address) as workers:
                check_hardware(study, space, workers)
                with (
                    _joined(session, study) as tracker,
                    trials_run(session, study, plan, workers, tracker, driver) as part,
                ):
                    if finetune_plan is not None:
                        parts += _join_finetune(session, part, finetune_plan, workers, driver)
            led = driver.led
    except BaseException as error:
        stopped_by = interruption(error)
        if stopped_by is None:
            raise
        if not isinstance(error, KeyboardInterrupt):
            console.print(f"while stopping: {error}", highlight=False, markup=False)
    return JoinEnd(parts=tuple(parts), led=led, stopped_by=stopped_by)


def _first_budget(study: Study, driver: Driver) -> SharedBudget:
    """The first driver's word, once it has given it. Raises InputError if nobody will."""
    budget = _budget_of(study, driver)
    if budget is None:
        raise InputError(
            "its trials have not begun, and no driver prepares them",
            where=f"study {study.record.name}",
            hint=f"where it began: tuner resume {study.record.name}",
        )
    return budget


def _budget_of(study: Study, driver: Driver) -> SharedBudget | None:
    """The budget that the first driver published, waited for as long as that one lives."""
    state = study.optuna()
    while (budget := published_budget(state)) is None and driver.led:
        time.sleep(WAIT_SECONDS)
    return budget or published_budget(state)


def _within(plan: Plan, budget: SharedBudget) -> Plan:
    """The plan with the first driver's budget: what the record began with may be outdated."""
    return dataclasses.replace(plan, trials=budget.trials, device_seconds=budget.device_seconds)


@contextmanager
def _joined(session: Session, study: Study) -> Iterator[Tracker]:
    """The study's runs in MLflow, under the parent that the first driver began and will end.

    Raises InputError if there is no such parent: then it is another MLflow.
    """
    uri, record = study.tracking_uri(), study.record
    if record.name not in tracked_studies(uri, record.model):
        raise InputError(
            f"this MLflow has no run of {record.name}",
            where=f"--tracking-uri {without_password(uri)}",
            hint="name the MLflow that the first driver writes to",
        )
    tracker = Tracker(
        uri,
        experiment=record.model,
        artifacts=session.home.artifacts,
        study=record.name,
        objective=study.space().objective,
        floor=session.floor,
        delivery=session.delivery,
    )
    try:
        tracker.start_study({}, joined=True)
        yield tracker
        tracker.end_study()
        tracker.flush()
    except BaseException as error:
        stopped = interruption(error) is not None
        session.say(tracker.abandon("KILLED" if stopped else "FAILED"))
        raise
    finally:
        tracker.close()


def _join_finetune(
    session: Session, probes: Part, plan: Plan, workers: Workers, driver: Driver
) -> list[Study]:
    """The second part, once the first driver has begun it; none if it died before that."""
    while (study := second_part(session.home, probes.study)) is None:
        if not driver.led:
            return []
        time.sleep(WAIT_SECONDS)
    budget = _budget_of(study, driver)
    if budget is None:
        return []
    trials = tuple(trial_records(probes.study.optuna(), probes.space))
    with session.console.status("keeping the heads of the best probes"):
        keep_heads(study.folder, study.space(), trials, probes.features, probes.context, workers)
    plan = _within(plan, budget)
    with (
        _joined(session, study) as tracker,
        trials_run(session, study, plan, workers, tracker, driver),
    ):
        return [study]
