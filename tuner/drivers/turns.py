"""The trials of a study, shared out among its drivers: asked for, taken over, ended.

Trials are counted and asked for under the lock between drivers, so that a budget is kept to the
trial, whoever spends it. Each trial names its driver; those of a driver that died are taken over
under their own numbers, and a driver that was only thought dead then finds that its end of such a
trial no longer counts. Without a driver, the study is this process' alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.report import Outcome, Status

from ..sampling.pareto_pruning import report, reported
from ..studies.outcomes import EndedTrial
from ..studies.study import OUTCOME
from .lock import Kept
from .presence import OWNER, Driver

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

    from ..spaces.space import SearchSpace

BUDGET = "budget"
"""Optuna study attribute: what there may be of trials and of time, set by the first driver."""
LOOK_SECONDS = 2.0
"""The storage is asked at most so often what the other drivers do."""


@dataclass(frozen=True, kw_only=True)
class SharedBudget:
    """The first driver's word to the others."""

    trials: int
    device_seconds: float | None = None
    """Of all drivers and sessions together, after which no trial is started; None: no limit."""
    closed: bool = False
    """Whether no further trial may be asked for: the time is over."""


def publish_budget(study: optuna.Study, budget: SharedBudget) -> None:
    """Tell joiners what there may be; before that they ask for no trial."""
    study.set_user_attr(BUDGET, dataclasses.asdict(budget))


def published_budget(study: optuna.Study) -> SharedBudget | None:
    """What the first driver published; None before it did."""
    found = study.user_attrs.get(BUDGET)
    return None if found is None else SharedBudget(**found)


class Turns:
    """One driver's view of the trials of a study.

    Args:
        study: Optuna's, with the driver's sampler and pruner.
        driver: who asks; None if nobody else can.
        trials: the budget; None to follow the one that the first driver published.
        on_adopted: hears the numbers of trials that are taken over, before they are run.
        on_ended_elsewhere: hears of each trial that another driver ended.
        on_budget: hears the budget that is followed, at every look.
    """

    def __init__(
        self,
        study: optuna.Study,
        driver: Driver | None,
        *,
        trials: int | None,
        on_adopted: Callable[[Sequence[int]], None] = lambda _: None,
        on_ended_elsewhere: Callable[[FrozenTrial], None] = lambda _: None,
        on_budget: Callable[[SharedBudget], None] = lambda _: None,
    ) -> None:
        self.reported: dict[int, set[int]] = {}
        """By number of a trial: epochs whose value Optuna has heard."""
        self.unfinished: list[FrozenTrial] = []
        """Trials taken over, not run yet."""
        self.known: set[int] = set()
        """Trials whose end this driver has heard of."""
        self._study = study
        self._driver = driver
        self._trials = trials
        self._on_adopted = on_adopted
        self._on_ended_elsewhere = on_ended_elsewhere
        self._on_budget = on_budget
        self._looked = -math.inf
        self._budget = 0
        self._asked = 0
        self._count()

    @property
    def asked(self) -> int:
        """Trials that were asked for, by all drivers, as of the last look."""
        return self._asked

    @property
    def left(self) -> int:
        """Trials that may still be asked for, as of the last look."""
        return max(0, self._budget - self._asked)

    # ---- asking ---------------------------------------------------------------------------

    def take(self, size: int, *, new: int, suggest: Callable[[Trial], object]) -> list[Trial]:
        """At most `size` trials: those taken over first, then at most `new` new ones, of which
        this driver has no more than its share of what is left. Possibly none.

        `suggest` sets all parameters of a trial. It is called before the next one is asked for, so
        that a sampler keeps the trials of a round apart, and proposes the same after a kill."""
        from optuna.trial import Trial

        first, self.unfinished = self.unfinished[:size], self.unfinished[size:]
        taken = [Trial(self._study, trial._trial_id) for trial in first]
        for trial in taken:
            suggest(trial)
        if len(taken) == size or not new:
            return taken
        with self.hold() as kept:
            self._count()
            drivers = 1 + (len(self._driver.others()) if self._driver else 0)
            for _ in range(min(size - len(taken), new, math.ceil(self.left / drivers))):
                if not kept():
                    break  # The rest of the round is asked for when the lock is ours again.
                trial = self._study.ask()
                if self._driver is not None:
                    trial.set_user_attr(OWNER, self._driver.id)
                suggest(trial)
                self._asked += 1
                taken.append(trial)
        return taken

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """Tell a trial's value; False if another driver has taken it over and ended it."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            report(trial, value, epoch)
        except UpdateFinishedTrialError:
            return False
        return True

    @contextmanager
    def ending(self, trials: Sequence[Trial]) -> Iterator[list[bool]]:
        """Hold the lock while the ends of trials are told; False for each that is no longer this
        driver's."""
        if self._driver is None:
            yield [True] * len(trials)
            return
        with self.hold():
            found = [self._study._storage.get_trial(trial._trial_id) for trial in trials]
            yield [
                trial.user_attrs.get(OWNER) == self._driver.id and not trial.state.is_finished()
                for trial in found
            ]
        self.known.update(trial.number for trial in trials)

    def hold(self) -> AbstractContextManager[Kept]:
        """The lock between the study's drivers; not reentrant."""
        return nullcontext(lambda: True) if self._driver is None else self._driver.hold()

    def _count(self) -> None:
        """Learn how many trials there may be, and how many there are."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        self._asked = sum(trial.state != TrialState.WAITING for trial in trials)
        self._budget = self._trials or 0
        if self._trials is None:
            budget = published_budget(self._study)
            self._budget = 0 if budget is None or budget.closed else budget.trials
            if budget is not None:
                self._on_budget(budget)

    # ---- the others -----------------------------------------------------------------------

    def look(self, *, now: bool = False) -> None:
        """See what the other drivers did, at most every LOOK_SECONDS unless `now`: trials that
        ended, trials that are nobody's any more, a budget that grew."""
        if self._driver is None or not (now or time.monotonic() - self._looked > LOOK_SECONDS):
            return
        self._looked = time.monotonic()
        self._driver.check()
        self._count()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self.known:
                self.known.add(trial.number)
                self._on_ended_elsewhere(trial)
        if self.orphans(self._running()):
            with self.hold():  # Others look for trials of the dead, too: only here it counts.
                self.adopt(self.orphans(self._running()))

    def orphans(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of running trials that no living driver runs. Final while the lock is held and if
        the trials were read before: a driver is known before it asks."""
        living = self._living()
        return [trial for trial in trials if trial.user_attrs.get(OWNER) not in living]

    def adopt(self, trials: Sequence[FrozenTrial]) -> None:
        """Take over trials. The lock is held by the caller."""
        for trial in trials:
            if self._driver is not None:
                self._study._storage.set_trial_user_attr(trial._trial_id, OWNER, self._driver.id)
            self.reported[trial.number] = set(reported(trial))
            self.unfinished.append(trial)
        if trials:
            self._on_adopted([trial.number for trial in trials])

    def others_run(self) -> bool:
        """Whether trials run that are not this driver's."""
        return self._driver is not None and any(
            trial.user_attrs.get(OWNER) != self._driver.id for trial in self._running()
        )

    def close(self) -> None:
        """If this driver ends the study: nobody asks for further trials."""
        if self._driver is not None and not self._driver.joins and self.left:
            budget = published_budget(self._study) or SharedBudget(trials=self._budget)
            budget = dataclasses.replace(budget, trials=self._budget, closed=True)
            publish_budget(self._study, budget)

    def settled(self, finished: Sequence[FrozenTrial]) -> list[int]:
        """Numbers of those that no other living driver ended: it may be writing them yet."""
        others = self._living() - {self._driver.id if self._driver else ""}
        return [t.number for t in finished if t.user_attrs.get(OWNER) not in others]

    def of_the_dead(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Finished trials of drivers that live no more."""
        if self._driver is None:
            return []
        living = self._living()
        return [
            trial
            for trial in trials
            if trial.state.is_finished() and trial.user_attrs.get(OWNER, "") not in {"", *living}
        ]

    def _living(self) -> set[str]:
        """Ids of the drivers that live, this one included."""
        return set() if self._driver is None else {self._driver.id, *self._driver.others()}

    def _running(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def remembered(trial: FrozenTrial, space: SearchSpace) -> EndedTrial | None:
    """A finished trial as Optuna remembers it, without its curve; None if it was ended by hand,
    without the attribute that says how."""
    kept = trial.user_attrs.get(OUTCOME)
    if kept is None:
        return None
    return EndedTrial(
        number=trial.number,
        settings=space.from_params(trial.params),
        outcome=Outcome(
            status=Status(kept["status"]),
            reason=kept["reason"],
            best_value=kept["best_value"],
            best_epoch=kept["best_epoch"],
            best_metrics=kept["metrics"],
            seconds=kept["seconds"],
            ended=0.0 if trial.datetime_complete is None else trial.datetime_complete.timestamp(),
        ),
    )
