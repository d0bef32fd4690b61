"""What a session takes up of those before it: trials that a dead driver left, ends not yet told.

Optuna's storage says which trials there are, the outcome log of this home how they ended. A trial
without an end is run again under its number; one whose end is in the log is only told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, Trial, TrialState

from ..drivers.turns import SharedBudget, Turns, publish_budget, remembered
from ..spaces.space import SearchSpace
from ..studies.outcomes import EndedTrial, OutcomeLog
from ..studies.plan import Plan
from ..tracking.tracker import Tracker
from .telling import tell

if TYPE_CHECKING:
    import optuna


def begin_session(
    study: optuna.Study,
    turns: Turns,
    ended: Mapping[int, EndedTrial],
    space: SearchSpace,
    plan: Plan,
    tracker: Tracker,
    *,
    joins: bool,
) -> list[EndedTrial]:
    """Trials that have an end, after those left running were taken up and MLflow was repaired.

    The first driver (not one that `joins`) then gives a new study the space's own points, and says
    what there may be of trials and time.
    """
    finished = take_up(study, turns, ended, space)
    tracker.repair(ended, turns.settled(finished))
    if not joins:
        if not finished and not turns.unfinished:
            for point in space.points:
                study.enqueue_trial(space.to_params(point), skip_if_exists=True)
        budget = SharedBudget(trials=plan.trials, device_seconds=plan.device_seconds)
        publish_budget(study, budget)
    return [e for e in (ended.get(t.number) or remembered(t, space) for t in finished) if e]


def take_up(
    study: optuna.Study, turns: Turns, ended: Mapping[int, EndedTrial], space: SearchSpace
) -> list[FrozenTrial]:
    """Trials that have an end, in order of number. Those that were running when their driver died
    are taken over; one whose end was logged but not told is told now."""
    with turns.hold():
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        orphans = turns.orphans(running)
        for trial in orphans:
            if trial.number in ended:
                outcome = ended[trial.number].outcome
                tell(study, Trial(study, trial._trial_id), outcome, space)
        turns.adopt([trial for trial in orphans if trial.number not in ended])
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    turns.known.update(trial.number for trial in finished)
    return finished


def deliver_for_the_dead(
    study: optuna.Study, turns: Turns, space: SearchSpace, log: OutcomeLog, tracker: Tracker
) -> None:
    """Ends that a driver of another home told Optuna and, dying, not MLflow: as Optuna knows them,
    without their curve, which is in that home and comes with a resume there."""
    ours = log.read()
    dead = turns.of_the_dead(study.get_trials(deepcopy=False))
    lacking = [remembered(trial, space) for trial in dead if trial.number not in ours]
    ends = {end.number: end for end in lacking if end is not None}
    if ends:
        tracker.learn_runs()
        tracker.repair(ends, list(ends))
