"""Between Optuna and Ray Tune: rounds of trials in, cohorts out, each trial's end told.

Tune asks `suggest` for its next trial; we answer with a cohort. When no cohort waits, Optuna is
asked for a round of trials at once. They form one cohort, or with several workers one for all that
read the same features. At rungs all values of a cohort are reported before any is judged. Each
trial is told COMPLETE, PRUNED or FAIL (Ray's own OptunaSearch tells stopped trials as COMPLETE,
which misleads the sampler).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.search import Searcher

from core.config import TrialConfig
from core.errors import InputError, NoRoomError
from core.report import Outcome, Status

from ..budgets.device_time import SAVE_SECONDS, DeviceMeter
from ..drivers.turns import Turns
from ..goals.costs import ATTRIBUTE
from ..goals.judge import ANYTHING_GOES, Judge
from ..sampling.pareto_pruning import should_stop
from ..sampling.pruners import PRUNERS
from ..sampling.rounds import SMALLEST_ROUND, rest_of_round, round_size
from ..sampling.wilcoxon import fold_values
from ..spaces.space import SearchSpace
from ..studies.outcomes import OutcomeLog
from .channel import ChannelHandle
from .context import FeatureRequest, bytes_in_memory, request_of, view_folders
from .telling import tell

if TYPE_CHECKING:
    import optuna

SEED_STRIDE = 1_000_003
TOGETHER_BYTES = 1 << 30
"""Of features that the trials of one cohort read: each of its processes holds them all."""

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
    request: FeatureRequest


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Trials that train together."""

    name: str
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
    meter: DeviceMeter | None = None
    """Hears of every cohort, and says when the device time is spent; None: nobody counts it."""


class CohortSearcher(Searcher):
    """Ray Tune's view of a study.

    Args:
        study: with sampler and pruner.
        features: folder of each request's matrix.
        log: keeps every outcome before anyone is told.
        rungs: epochs at which the pruner is asked.
        turns: gives out trials, and knows of the study's other drivers; None: there are none.
        on_lost: hears the name of a cohort whose Tune trial is beyond retrying.
        judge: knows what trials cost and which may win.
        num_workers: that run cohorts side by side.
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
        turns: Turns | None = None,
        on_lost: Callable[[str], None] | None = None,
        judge: Judge = ANYTHING_GOES,
        num_workers: int = 1,
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
        self._turns = turns or Turns(study, None, trials=budget.trials)
        self._on_lost = on_lost
        self._judge = judge
        self._num_workers = num_workers
        self._cohorts = 0
        self._queue: deque[Cohort] = deque()
        self._again: set[str] = set()
        """Cohorts whose worker died, that Tune was given a second time."""
        self._running: dict[str, Cohort] = {}
        self._failure: Exception | None = None

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
        self.check()
        self._turns.look()
        while not self._queue and self._may_ask():
            self._ask_round()
        if not self._queue:
            return None if self._running else Searcher.FINISHED
        cohort = self._queue.popleft()
        self._running[trial_id] = cohort
        if self._budget.meter is not None:
            self._budget.meter.begin(cohort.name)
        for member in cohort.members:
            for watcher in self._watchers:
                watcher.trial_started(member.trial.number, member.settings)
        return {
            "cohort": cohort.name,
            "numbers": cohort.numbers,
            "trials": [member.config.to_dict() for member in cohort.members],
            "features": [view_folders(self._features, m.request) for m in cohort.members],
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A cohort reports: at a rung, the pruner says which of its trials stop."""
        self.check()
        cohort = self._running[trial_id]
        epoch = result["epoch"]
        values = dict(zip(result["places"], result["values"], strict=True))
        if not values:
            return
        trials = {place: cohort.members[place].trial for place in values}
        if epoch in self._rungs:
            if PRUNERS[self._space.pruner.name].by_fold:
                for place, by_fold in zip(values, result.get("folds", ()), strict=False):
                    trials[place].set_user_attr(fold_values(epoch), by_fold)
            for place, value in values.items():
                # A trial that is run again, after a kill, has reported some rungs already.
                reported = self._turns.reported.setdefault(trials[place].number, set())
                if epoch not in reported and self._turns.report(trials[place], epoch, value):
                    reported.add(epoch)
            stops = [place for place, trial in trials.items() if should_stop(trial)]
            self._channel.rule(cohort.name, epoch, stops)
        if self._budget.meter is not None:
            self._budget.meter.save(at_most_every=SAVE_SECONDS)
        by_number = {trials[place].number: value for place, value in values.items()}
        for watcher in self._watchers:
            watcher.cohort_progress(cohort.numbers, epoch, by_number)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A cohort is over. Tune would take an error here for the trial's, and run it again: ours
        are raised when it next asks."""
        try:
            self._complete(trial_id, error)
        except Exception as failure:
            self._failure = failure

    def check(self) -> None:
        """Raises what went wrong at the end of a cohort."""
        if self._failure is not None:
            raise self._failure

    def _complete(self, trial_id: str, error: bool) -> None:
        """A cohort's outcomes wait in the channel, unless its worker died."""
        cohort = self._running.pop(trial_id)
        last = (self._channel.collect(cohort.name) or [None])[-1]
        if last is None and not error:
            self._running[trial_id] = cohort  # Interrupted: its trials stay RUNNING to be resumed.
            return
        if isinstance(last, NoRoomError):
            self._running[trial_id] = cohort
            raise last
        if self._budget.meter is not None:
            self._budget.meter.end(cohort.name, numbers=cohort.numbers)
        if last is None and cohort.name not in self._again:
            # Tune tries again on the worker that it keeps, also when that one is what died.
            self._again.add(cohort.name)
            self._queue.appendleft(cohort)
            return
        if isinstance(last, list):
            outcomes: Sequence[Outcome] = last
        else:
            if self._on_lost is not None:
                self._on_lost(cohort.name)
            reason = f"its worker failed: {last or 'the process died'}"
            outcomes = [Outcome(status=Status.FAILED, reason=reason)] * len(cohort.members)
        self._end(
            [
                (member.trial, member.settings, self._judge.ended(member.config, outcome))
                for member, outcome in zip(cohort.members, outcomes, strict=True)
            ]
        )

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
        if self._turns.unfinished:
            return True
        in_time = self._budget.deadline is None or time.time() < self._budget.deadline
        if not in_time or self._turns.left == 0:
            return False
        return self._budget.meter is None or not self._budget.meter.spent

    def _ask_round(self) -> None:
        """Ask for a round and group it. A trial that cannot run is told so and not queued."""
        members: list[Member] = []
        for trial in self._take_round():
            settings = {"seed": trial_seed(self._seed, trial.number)}
            settings |= self._space.suggest(trial)
            try:
                config = TrialConfig.from_dict(settings)
                refused = self._judge.refused(config)
                if refused is not None:
                    self._end([(trial, settings, refused)])
                    continue
                request = request_of(config)
                if request not in self._features:
                    raise InputError(f"there are no features for {request.label}")
            except InputError as error:
                failed = Outcome(status=Status.FAILED, reason=str(error))
                self._end([(trial, settings, failed)])
                continue
            if self._space.minimised:
                trial.set_user_attr(ATTRIBUTE, self._judge.costs_of(config))
            members.append(Member(trial=trial, settings=settings, config=config, request=request))
        for group in self._grouped(members):
            self._cohorts += 1
            self._queue.append(Cohort(name=f"cohort-{self._cohorts}", members=group))

    def _grouped(self, members: Sequence[Member]) -> list[list[Member]]:
        """The trials that train together: those on the same features, and with one worker others,
        too, as long as their features fit its memory together; in fine-tuning, each alone. Of
        several workers none gets much more than its share of a round."""
        if self._space.mode == "finetune":
            return [[member] for member in members]
        by_request: dict[FeatureRequest, list[Member]] = {}
        for member in members:
            by_request.setdefault(member.request, []).append(member)
        if self._num_workers > 1:
            share = max(SMALLEST_ROUND, math.ceil(len(members) / self._num_workers))
            return [
                some[start : start + share]
                for some in by_request.values()
                for start in range(0, len(some), share)
            ]
        groups: list[list[Member]] = []
        held = 0
        for request, some in by_request.items():
            size = bytes_in_memory(request, self._features[request])
            if groups and held + size <= TOGETHER_BYTES:
                groups[-1] += some
                held += size
            else:
                groups.append(some)
                held = size
        return groups

    def _take_round(self) -> list[optuna.Trial]:
        """A new round; after a kill, what is left of the one that it cut off, which trains and is
        judged together as it would have been."""
        asked, suggest = self._turns.asked, self._space.suggest
        if self._turns.unfinished:
            rest = rest_of_round(self._space, asked)
            return self._turns.take(self._space.cohort_size, new=rest, suggest=suggest)
        size = round_size(self._space, asked)
        return self._turns.take(size, new=size, suggest=suggest)

    def _end(self, ends: Sequence[tuple[optuna.Trial, Settings, Outcome]]) -> None:
        """The log first, all of a cohort at once: what it holds can be told again, should we die
        before the rest."""
        now = time.time()
        with self._turns.ending([trial for trial, _, _ in ends]) as ours:
            # A driver that gave no sign of life for long may have lost trials to another.
            kept = [
                (trial, settings, dataclasses.replace(outcome, ended=now))
                for (trial, settings, outcome), own in zip(ends, ours, strict=True)
                if own
            ]
            self._log.trials_ended([(t.number, settings, o) for t, settings, o in kept])
            for trial, _, outcome in kept:
                tell(self._study, trial, outcome, self._space)
        for trial, settings, outcome in kept:
            for watcher in self._watchers:
                watcher.trial_ended(trial.number, settings, outcome)
