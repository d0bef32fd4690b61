"""A sampler that looks at a bounded part of a long study.

Optuna's TPE goes through every trial for every group of parameters each time it is asked, so that
asking grows with the study (`tests/benchmarks/bench_driver.py`). Of its two
densities, the one of good trials rests on the best 25 alone, and the other is a sum of thousands
of kernels that a fair part shows as well. So a sampler of any kind is shown, in a small study of
its own, the best trials and an even selection of the rest. Only Optuna's public interface is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

NUM_BEST = 25
"""TPE's good trials are a tenth of all, and at most 25: they are always among those shown."""
NUM_SHOWN = 250
"""Trials shown: with fewer, a tenth would be less than 25."""
COPY = "copy"
"""Marks running trials of the small study that were put into it."""
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class BoundedSampler(BaseSampler):
    """Samples as `build(seed)` would that knew NUM_SHOWN trials of the study.

    Args:
        build: makes the sampler from a seed; called again whenever trials have ended, as what is
            shown changes then.
        seed: the same seed and the same study propose the same trials.
        num_shown: trials shown at most, besides those that run.
        as_shown: makes of the ended trials that are selected what is shown.
    """

    def __init__(
        self,
        build: Callable[[int], BaseSampler],
        *,
        seed: int,
        num_shown: int = NUM_SHOWN,
        as_shown: Callable[[list[FrozenTrial], optuna.Study], list[FrozenTrial]] = (
            lambda trials, study: trials
        ),
    ) -> None:
        self._build = build
        self._seed = seed
        self._shown = _SmallStudy(num_shown, as_shown)
        self._sampler: BaseSampler | None = None
        self._num_ended = -1
        self._twins: dict[int, Trial] = {}
        """By number in the real study: the same trial in the small one."""

    def seeded(self, seed: int) -> BoundedSampler:
        """The same with another seed. Both show the same small study, so that it is not put
        together anew for each trial that has a sampler of its own."""
        other = BoundedSampler(self._build, seed=seed)
        other._shown = self._shown
        return other

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        small = self._shown.of(study, asked=self._twins)
        if self._sampler is None or self._shown.num_ended != self._num_ended:
            self._num_ended = self._shown.num_ended
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._sampler = self._build(self._seed + self._num_ended)
        small.sampler = self._sampler
        self._twins[trial.number] = small.ask()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}  # The small study's sampler has a relative space of its own.

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if trial.number not in self._twins:  # of an earlier session
            self.before_trial(study, trial)
        return _suggest(self._twins[trial.number], param_name, param_distribution)


class _SmallStudy:
    """A study of the trials that are shown, put together anew when trials have ended."""

    def __init__(
        self,
        num_shown: int,
        as_shown: Callable[[list[FrozenTrial], optuna.Study], list[FrozenTrial]],
    ) -> None:
        self._num_shown = num_shown
        self._as_shown = as_shown
        self._study: optuna.Study | None = None
        self._running: dict[int, dict[str, Any]] = {}
        """Parameters of the running trials that are in it as copies, by number."""
        self.num_ended = -1

    def of(self, study: optuna.Study, *, asked: dict[int, Trial]) -> optuna.Study:
        """It, with what runs in `study` as it runs now. `asked`: the twins in it of whoever asks;
        those of others are taken out, and the trials shown as they became."""
        ended = study.get_trials(deepcopy=False, states=_ENDED)
        running = {
            trial.number: trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        }
        for number in asked.keys() - running.keys():
            del asked[number]
        if self._study is None or len(ended) != self.num_ended or not self._holds(running):
            self.num_ended = len(ended)
            self._study = optuna.create_study(directions=study.directions)
            shown = selection(ended, study, self._num_shown)
            self._study.add_trials(self._as_shown(shown, study))
            self._running = {}
            theirs = running
        else:
            own = {twin.number for twin in asked.values() if twin.study is self._study}
            for left in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if left.number not in own and COPY not in left.user_attrs:
                    self._study.tell(left.number, state=TrialState.FAIL)
            theirs = {n: t for n, t in running.items() if n not in asked}
        for number, trial in theirs.items():
            if trial.params and number not in self._running:
                self._running[number] = trial.params
                self._study.add_trial(_copy(trial))
        return self._study

    def _holds(self, running: Mapping[int, FrozenTrial]) -> bool:
        """Whether its copies of running trials are still true."""
        return all(
            number in running and running[number].params == params
            for number, params in self._running.items()
        )


def selection(
    ended: Sequence[FrozenTrial], study: optuna.Study, num_shown: int
) -> list[FrozenTrial]:
    """The best trials and an even selection of the others, in order of number.

    Ranked as TPE does: complete trials come before pruned ones, those by how far they came, and
    last what violates a constraint. With several objectives the best are those that the fewest
    others beat in all of them.
    """
    if len(ended) <= num_shown:
        return list(ended)
    if len(study.directions) == 1:
        sign = -1 if study.direction.name == "MAXIMIZE" else 1
        ranked = sorted(ended, key=lambda trial: rank(trial, sign))
    else:
        ranked = _by_dominance(ended, study)
    best, rest = ranked[:NUM_BEST], sorted(ranked[NUM_BEST:], key=lambda trial: trial.number)
    num_others = num_shown - len(best)
    others = [rest[(i + 1) * len(rest) // num_others - 1] for i in range(num_others)]
    return sorted([*best, *others], key=lambda trial: trial.number)


def rank(trial: FrozenTrial, sign: int) -> tuple[float, float, float]:
    """A key by which ended trials are sorted, best first; `sign` is -1 to maximise."""
    if is_infeasible(trial):
        return (3, 0, 0)
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None
        return (0, 0, sign * trial.value)
    if not trial.intermediate_values:
        return (2, 0, 0)
    step = max(trial.intermediate_values)
    return (1, -step, sign * trial.intermediate_values[step])


def is_infeasible(trial: FrozenTrial) -> bool:
    """Whether it violates a constraint; a trial without any counts as feasible."""
    return any(value > 0 for value in trial.constraints.values())


def _by_dominance(ended: Sequence[FrozenTrial], study: optuna.Study) -> list[FrozenTrial]:
    """Complete, feasible trials by how many others are better in one objective and no worse in
    any; the rest after them."""
    signs = np.array([-1 if d.name == "MAXIMIZE" else 1 for d in study.directions])
    complete = [t for t in ended if t.state == TrialState.COMPLETE and not is_infeasible(t)]
    losses = signs * np.array([t.values for t in complete]).reshape(len(complete), len(signs))
    beaten = [
        int(((losses <= own).all(axis=1) & (losses < own).any(axis=1)).sum()) for own in losses
    ]
    order = sorted(range(len(complete)), key=lambda place: beaten[place])
    numbers = {trial.number for trial in complete}
    return [complete[place] for place in order] + [t for t in ended if t.number not in numbers]


def _copy(trial: FrozenTrial) -> FrozenTrial:
    """A running trial as the small study can take it: what it set so far."""
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={COPY: True},
    )


def _suggest(twin: Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution():
            return twin.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return twin.suggest_int(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )
        case FloatDistribution():
            return twin.suggest_float(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )
    raise TypeError(f"no such distribution is known: {distribution}")
