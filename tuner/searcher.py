"""Between Optuna and Ray Tune: rounds of trials in, cohorts out, each trial's end told.

Tune asks `suggest` for its next trial; we answer with a cohort. When no cohort waits, Optuna is
asked for a round of trials at once, and those that read the same features form a cohort. At rungs
all values of a cohort are reported before any is judged. Each trial is told COMPLETE, PRUNED or
FAIL (Ray's own OptunaSearch tells stopped trials as COMPLETE, which misleads the sampler).
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.search import Searcher

from core.config import TrialConfig
from core.errors import InputError
from core.report import Outcome, Status

from .channel import ChannelHandle
from .context import FeatureRequest, request_of, view_folders
from .outcomes import OutcomeLog
from .space import SearchSpace
from .study import OUTCOME, outcome_attribute

if TYPE_CHECKING:
    import optuna

SEED_STRIDE = 1_000_003
FITS = "fits_in_memory"
"""Optuna's constraint, above 0 where it is violated. Trials without it count as feasible."""

Settings = Mapping[str, Any]


def trial_seed(study_seed: int, number: int) -> int:
    """A trial's own seed: no two trials of small studies share one."""
    return study_seed * SEED_STRIDE + number


class Watcher(Protocol):
    """Who wants to know what trials do: the live table, MLflow."""

    def trial_started(self, number: int, settings: Settings) -> None: ...

    def cohort_progress(
        self, numbers: Sequence[int], epoch: int, values: Mapping[int, float]
    ) -> None:
        """`values`: the objective after `epoch`, by trial number."""
        ...

    def trial_ended(self, number: int, settings: Settings, outcome: Outcome) -> None:
        """A trial that could not even start ends without having started."""
        ...


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trial of a cohort."""

    trial: optuna.Trial
    settings: Settings
    """What the space set, and the seed."""
    config: TrialConfig


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Trials that read the same features."""

    name: str
    request: FeatureRequest
    members: Sequence[Member]

    @property
    def numbers(self) -> list[int]:
        return [member.trial.number for member in self.members]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a study has had enough."""

    trials: int
    """Trials in all, whatever their end."""
    deadline: float | None = None
    """`time.time()` after which no trial is started."""


class CohortSearcher(Searcher):
    """Ray Tune's view of a study.

    Args:
        study: with sampler and pruner.
        features: folder of each request's matrix.
        log: keeps every outcome before anyone is told.
        rungs: epochs at which the pruner is asked.
        unfinished: trials of an earlier session that were running when it ended; they go first.
        on_lost: hears the name of a cohort whose Tune trial is beyond retrying.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        *,
        budget: Budget,
        features: Mapping[FeatureRequest, str],
        channel: ChannelHandle,
        log: OutcomeLog,
        watchers: Sequence[Watcher],
        seed: int,
        rungs: Sequence[int],
        unfinished: Sequence[optuna.Trial] = (),
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self._study = study
        self._space = space
        self._budget = budget
        self._features = features
        self._channel = channel
        self._log = log
        self._watchers = watchers
        self._seed = seed
        self._rungs = frozenset(rungs)
        self._unfinished = list(unfinished)
        self._on_lost = on_lost
        self._reported = {
            trial.number: set(study.trials[trial.number].intermediate_values)
            for trial in unfinished
        }
        self._asked = len(study.get_trials(deepcopy=False)) - self._waiting()
        self._cohorts = 0
        self._queue: deque[Cohort] = deque()
        self._running: dict[str, Cohort] = {}

    @property
    def has_work(self) -> bool:
        """Whether a cohort could be started now."""
        return bool(self._queue) or self._may_ask()

    @property
    def interrupted(self) -> bool:
        """Whether trials are left that were started or are still to be."""
        return bool(self._running) or self.has_work

    @property
    def running_numbers(self) -> list[int]:
        """Trials that were started and have no end."""
        return [number for cohort in self._running.values() for number in cohort.numbers]

    # ---- what Ray Tune calls --------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next cohort as a Tune config; None to be asked again; FINISHED when all is done."""
        while not self._queue and self._may_ask():
            self._ask_round()
        if not self._queue:
            return None if self._running else Searcher.FINISHED
        cohort = self._queue.popleft()
        self._running[trial_id] = cohort
        for member in cohort.members:
            for watcher in self._watchers:
                watcher.trial_started(member.trial.number, member.settings)
        return {
            "cohort": cohort.name,
            "numbers": cohort.numbers,
            "trials": [member.config.to_dict() for member in cohort.members],
            "features": view_folders(self._features, cohort.request),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A cohort reports: at a rung, the pruner says which of its trials stop."""
        cohort = self._running[trial_id]
        epoch = result["epoch"]
        values = dict(zip(result["places"], result["values"], strict=True))
        if not values:
            return
        trials = {place: cohort.members[place].trial for place in values}
        if epoch in self._rungs:
            for place, value in values.items():
                # A trial that is run again, after a kill, has reported some rungs already.
                reported = self._reported.setdefault(trials[place].number, set())
                if epoch not in reported:
                    trials[place].report(value, epoch)
                    reported.add(epoch)
            stops = [place for place, trial in trials.items() if trial.should_prune()]
            self._channel.rule(cohort.name, epoch, stops)
        by_number = {trials[place].number: value for place, value in values.items()}
        for watcher in self._watchers:
            watcher.cohort_progress(cohort.numbers, epoch, by_number)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A cohort is over; its outcomes wait in the channel, unless its worker died."""
        cohort = self._running.pop(trial_id)
        last = (self._channel.collect(cohort.name) or [None])[-1]
        if last is None and not error:
            self._running[trial_id] = cohort  # Interrupted: its trials stay RUNNING to be resumed.
            return
        if isinstance(last, list):
            outcomes: Sequence[Outcome] = last
        else:
            if self._on_lost is not None:
                self._on_lost(cohort.name)
            reason = f"its worker failed: {last or 'the process died'}"
            outcomes = [Outcome(status=Status.FAILED, reason=reason)] * len(cohort.members)
        for member, outcome in zip(cohort.members, outcomes, strict=True):
            self._end(member.trial, member.settings, outcome)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's storage is the state, Tune's copy of it is never restored."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a study is resumed from its storage: tuner resume")

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickle of its searcher for a restore that we do not use."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> CohortSearcher:
        """Tune copies its searcher; a study exists once."""
        return self

    # ---- rounds ---------------------------------------------------------------------------

    def _may_ask(self) -> bool:
        if self._unfinished:
            return True
        in_time = self._budget.deadline is None or time.time() < self._budget.deadline
        return in_time and self._asked < self._budget.trials

    def _ask_round(self) -> None:
        """Ask for a round and group it. A trial that cannot run is told so and not queued."""
        groups: dict[FeatureRequest, list[Member]] = {}
        for trial in self._next_trials():
            settings = {"seed": trial_seed(self._seed, trial.number)}
            settings |= self._space.suggest(trial)
            try:
                config = TrialConfig.from_dict(settings)
                request = request_of(config)
                if request not in self._features:
                    raise InputError(f"there are no features for {request.label}")
            except InputError as error:
                failed = Outcome(status=Status.FAILED, reason=str(error))
                self._end(trial, settings, failed)
                continue
            member = Member(trial=trial, settings=settings, config=config)
            groups.setdefault(request, []).append(member)
        for request, members in groups.items():
            size = 1 if self._space.mode == "finetune" else len(members)
            for start in range(0, len(members), size):
                self._cohorts += 1
                name = f"cohort-{self._cohorts}"
                part = members[start : start + size]
                self._queue.append(Cohort(name=name, request=request, members=part))

    def _next_trials(self) -> list[optuna.Trial]:
        """Unfinished trials of an earlier session first, then new ones up to the budget."""
        size = self._space.cohort_size
        trials, self._unfinished = self._unfinished[:size], self._unfinished[size:]
        count = max(0, min(size - len(trials), self._budget.trials - self._asked))
        self._asked += count
        return trials + [self._study.ask() for _ in range(count)]

    def _waiting(self) -> int:
        from optuna.trial import TrialState

        return len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _end(self, trial: optuna.Trial, settings: Settings, outcome: Outcome) -> None:
        """The log first: what it holds can be told again, should we die before the rest."""
        outcome = dataclasses.replace(outcome, ended=time.time())
        self._log.trial_ended(trial.number, settings, outcome)
        tell(self._study, trial, outcome)
        for watcher in self._watchers:
            watcher.trial_ended(trial.number, settings, outcome)


def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Tell Optuna a trial's end, with the rest of the outcome as an attribute.

    An infeasible trial is one that was stopped before its first epoch and violates a constraint:
    samplers learn from that, where they would forget a failed one.
    """
    from optuna.trial import TrialState

    trial.set_user_attr(OUTCOME, outcome_attribute(outcome))
    # A kill may have come between here and `tell`, hence the second question.
    if outcome.status is Status.INFEASIBLE and FITS not in trial.constraints:
        trial.set_constraint(FITS, 1.0)
    match outcome.status:
        case Status.COMPLETE:
            study.tell(trial, outcome.best_value)
        case Status.PRUNED | Status.INFEASIBLE:
            study.tell(trial, state=TrialState.PRUNED)
        case Status.FAILED:
            study.tell(trial, state=TrialState.FAIL)
