"""A study's trials on Ray Tune, from the first round to the last or to an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from core.errors import InputError

from ..budgets.device_time import DeviceMeter
from ..drivers.presence import Driver
from ..drivers.turns import SharedBudget, Turns, remembered
from ..goals.judge import ANYTHING_GOES, Judge
from ..sampling.pruners import build_pruner
from ..sampling.reproducible import reproducible_sampler
from ..signals import check_stopped, tune_stops
from ..spaces.space import SearchSpace
from ..studies.outcomes import OutcomeLog
from ..studies.plan import Plan
from ..studies.study import Study
from ..tracking.tracker import Tracker
from ..views.live import StudyView
from .channel import ChannelHandle, start_channel
from .cluster import ONE_WORKER, Share, Workers
from .cohort import run_cohort
from .context import Context, FeatureRequest
from .job_board import BoardHandle, start_board
from .retention import StateKeeper
from .searcher import Budget, CohortSearcher
from .taking_up import begin_session, deliver_for_the_dead
from .worker_group import PLACEHOLDER, follow_trial, worker_groups

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

WORKER_RETRIES = 2
"""How often a cohort whose worker died is run again."""
WAIT_SECONDS = 1.0
"""Between two looks at what the other drivers still run."""


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Tune makes texts of what its searcher raises: an InputError comes back as itself."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from None


def run_trials(
    study: Study,
    space: SearchSpace,
    context: Context,
    plan: Plan,
    workers: Workers,
    *,
    features: Mapping[FeatureRequest, str],
    tracker: Tracker,
    view: StudyView,
    share: Share = ONE_WORKER,
    driver: Driver | None = None,
    meter: DeviceMeter | None = None,
    judge: Judge = ANYTHING_GOES,
) -> bool:
    """Run trials; True when the budget is spent. Raises Interrupted if a signal came meanwhile.

    Trials that an earlier session left running go first, under their own numbers. `share` is what
    a fine-tuning trial takes of the cluster. With a `driver` there may be others: then all trials
    have ended at the end, whoever ran them. `meter` counts what trials take of devices, and ends
    the study where that is spent. `judge` knows what trials cost and which may win.
    """
    if space.mode == "finetune":
        context, workers = _shared_out(context, workers, share)
    log = OutcomeLog(study.folder)
    optuna_study = study.optuna(
        pruner=build_pruner(space.pruner, space.max_epochs, minimised=space.minimised)
    )
    turns = _turns_of(optuna_study, space, plan, driver, meter, tracker, view)
    joins = driver is not None and driver.joins
    earlier = begin_session(optuna_study, turns, log.read(), space, plan, tracker, joins=joins)
    optuna_study.sampler = reproducible_sampler(space.sampler, space, study.record.seed)
    channel = start_channel()
    board = start_board(workers.per_trial) if workers.per_trial > 1 else None
    searcher = CohortSearcher(
        optuna_study,
        space,
        budget=Budget(trials=plan.trials, deadline=plan.deadline, meter=meter),
        features=features,
        channel=channel,
        log=log,
        watchers=[tracker, view, StateKeeper(context, earlier)],
        seed=study.record.seed,
        rungs=plan.rungs,
        turns=turns,
        on_lost=board.abandon if board else None,
        judge=judge,
        num_workers=workers.count,
    )
    with view.showing(earlier=earlier):
        while True:
            _fit(searcher, study, context, channel, board, workers)
            if searcher.interrupted or not _more_to_do(searcher, turns):
                break
    tracker.trials_interrupted(searcher.running_numbers)
    check_stopped()
    deliver_for_the_dead(optuna_study, turns, space, log, tracker)
    return not searcher.interrupted


def _shared_out(context: Context, workers: Workers, share: Share) -> tuple[Context, Workers]:
    """The machines shared out among fine-tuning trials."""
    workers = workers.for_trials(share)
    context = dataclasses.replace(
        context, num_threads=workers.num_threads, memory_share=workers.memory_share
    )
    return context, workers


def _turns_of(
    study: optuna.Study,
    space: SearchSpace,
    plan: Plan,
    driver: Driver | None,
    meter: DeviceMeter | None,
    tracker: Tracker,
    view: StudyView,
) -> Turns:
    """This session's view of the trials: a joiner follows the budget that the first driver
    published, also where that grows while it runs."""

    def follow(budget: SharedBudget) -> None:
        if meter is not None:
            meter.limit = budget.device_seconds

    def show(trial: FrozenTrial) -> None:
        end = remembered(trial, space)
        if end is not None:
            view.trial_ended(end.number, end.settings, end.outcome)

    return Turns(
        study,
        driver,
        trials=None if driver is not None and driver.joins else plan.trials,
        on_adopted=lambda _: tracker.learn_runs(),
        on_ended_elsewhere=show,
        on_budget=follow,
    )


def _fit(
    searcher: CohortSearcher,
    study: Study,
    context: Context,
    channel: ChannelHandle,
    board: BoardHandle | None,
    workers: Workers,
) -> None:
    from ray import tune

    if not searcher.has_work:
        return
    # A trial of several workers runs in a group; what Tune runs then only stands for it.
    groups: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if board is None:
        job = tune.with_parameters(run_cohort, context=context, channel=channel)
        resources = {"cpu": workers.cpus, "gpu": workers.gpus}
    else:
        groups = worker_groups(context, workers, board)
        job = tune.with_parameters(follow_trial, context=context, channel=channel, board=board)
        resources = PLACEHOLDER
    tuner = tune.Tuner(
        tune.with_resources(job, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=workers.count,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"trials-{time.time_ns()}",
            storage_path=str(study.folder / "tune"),
            failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
            verbose=0,
        ),
    )
    with groups, tune_stops(), own_errors():
        tuner.fit()
        searcher.check()


def _more_to_do(searcher: CohortSearcher, turns: Turns) -> bool:
    """Wait for the trials of the other drivers; True once there is something to run: a driver died,
    or the budget grew. False when all trials have ended."""
    turns.close()  # The time may be over before the trials are.
    while True:
        turns.look(now=True)
        if searcher.has_work:
            return True
        if not turns.others_run():
            return False
        time.sleep(WAIT_SECONDS)
