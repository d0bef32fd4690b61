"""A study's trials on Ray Tune, from the first round to the last or to an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, Trial, TrialState

from .channel import ChannelHandle, start_channel
from .cluster import ONE_WORKER, Share, Workers
from .cohort import run_cohort
from .context import Context, FeatureRequest
from .job_board import BoardHandle, start_board
from .live import StudyView
from .outcomes import EndedTrial, OutcomeLog
from .plan import Plan
from .retention import StateKeeper
from .sampling import build_pruner, build_sampler
from .searcher import Budget, CohortSearcher, tell
from .space import SearchSpace
from .study import Study
from .tracking import Tracker
from .worker_group import PLACEHOLDER, follow_trial, worker_groups

if TYPE_CHECKING:
    import optuna

WORKER_RETRIES = 2
"""How often a cohort whose worker died is run again."""
SAMPLER_STRIDE = 7919
"""A resumed study's sampler must not repeat the random numbers of an earlier session."""


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
) -> bool:
    """Run trials; True when the budget is spent, False if that was interrupted.

    Trials that an earlier session left running go first, under their own numbers. `share` is what
    a fine-tuning trial takes of the cluster.
    """
    if space.mode == "finetune":
        workers = workers.for_trials(share)
        context = dataclasses.replace(
            context, num_threads=workers.num_threads, memory_share=workers.memory_share
        )
    log = OutcomeLog(study.folder)
    ended = log.read()
    finished, unfinished = _earlier_trials(study.optuna(), ended)
    tracker.repair(ended, finished)
    earlier = [ended[number] for number in finished if number in ended]
    optuna_study = study.optuna(
        sampler=build_sampler(
            space.sampler, space, study.record.seed + SAMPLER_STRIDE * len(finished)
        ),
        pruner=build_pruner(space.pruner, space.max_epochs),
    )
    if not finished and not unfinished:
        for point in space.points:
            optuna_study.enqueue_trial(space.to_params(point), skip_if_exists=True)
    channel = start_channel()
    board = start_board(workers.per_trial) if workers.per_trial > 1 else None
    searcher = CohortSearcher(
        optuna_study,
        space,
        budget=Budget(trials=plan.trials, deadline=plan.deadline),
        features=features,
        channel=channel,
        log=log,
        watchers=[tracker, view, StateKeeper(context, earlier)],
        seed=study.record.seed,
        rungs=plan.rungs,
        unfinished=[Trial(optuna_study, trial._trial_id) for trial in unfinished],
        on_lost=board.abandon if board else None,
    )
    with view.showing(earlier=earlier):
        _fit(searcher, study, context, channel, board, workers)
    tracker.trials_interrupted(searcher.running_numbers)
    tracker.flush()
    return not searcher.interrupted


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
    with groups, own_interrupts():
        tuner.fit()


@contextlib.contextmanager
def own_interrupts() -> Iterator[None]:
    """Tune leaves its answer to Ctrl-C behind, which would swallow the next: ours comes back."""
    ours = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ours)


def _earlier_trials(
    study: optuna.Study, ended: Mapping[int, EndedTrial]
) -> tuple[list[int], list[FrozenTrial]]:
    """Numbers of trials with an end, and trials that were running when an earlier session ended.

    A trial whose end was logged but not told is told now.
    """
    finished, unfinished = [], []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING and trial.number in ended:
            tell(study, Trial(study, trial._trial_id), ended[trial.number].outcome)
            finished.append(trial.number)
        elif trial.state == TrialState.RUNNING:
            unfinished.append(trial)
        elif trial.state.is_finished():
            finished.append(trial.number)
    return finished, unfinished
