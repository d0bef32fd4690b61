"""One sub-study for each value of a categorical parameter, such as the backbone.

A Gaussian process over numbers is at its best where they mean the same from trial to trial; a rate
that suits one backbone says little of another. So each value has a study of its own, and a bandit
shares the trials among the values. Nothing is kept: both are made from the real study's trials
each time, so that a resumed study, or one of several drivers, goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.errors import InputError

from ..goals.refused import is_refused
from ..spaces.domain import Choice
from .bounded import rank, selection
from .quasi_random import distributions_of

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace

NUM_SHOWN = 120
"""Trials that a sub-study is shown at most: fitting a Gaussian process takes their cube."""
GOOD_SHARE = 4
"""One in this many trials counts as good for the bandit."""
CONFIDENCE = 0.1
"""Chance that the bandit's bound of some value is too low."""
SEED_STRIDE = 101
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class PerValueSampler(BaseSampler):
    """Shares trials among the values of `per`, and has `build(seed)` propose the rest for each.

    All parameters of the space are proposed together. One that does not apply beside the others is
    told to the sub-study at the middle of its range, so that trials with different conditions are
    points of one space. A pruned trial is told with the value it would probably have reached: see
    `with_expected_gain`.

    Args:
        per: a parameter that every trial chooses.
        build: makes a sampler for one sub-study.
        startup_each: trials of each value before the bandit starts.
        seed: the same seed and the same study propose the same trials.

    Raises:
        InputError: there is no such parameter, or it is not a plain choice.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        per: str,
        build: Callable[[int], BaseSampler],
        startup_each: int,
        seed: int,
    ) -> None:
        self._per = per
        self._values = values_of(space, per)
        self._distributions = {k: d for k, d in distributions_of(space).items() if k != per}
        self._build = build
        self._startup_each = startup_each
        self._seed = seed
        self._proposals: dict[int, dict[str, Any]] = {}
        """By trial's number: all parameters of those that run."""
        self._studies: dict[Any, tuple[tuple[int, int], optuna.Study]] = {}
        """By value: what it was made of, and the sub-study."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}  # The sub-study's sampler has a relative space of its own.

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
        if trial.number not in self._proposals:
            self._proposals[trial.number] = self._propose(study, trial)
        return self._proposals[trial.number][param_name]

    def _propose(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """Values of all parameters; those that a point or an earlier session gave stay."""
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        running = {t.number for t in trials if t.state == TrialState.RUNNING}
        self._proposals = {n: p for n, p in self._proposals.items() if n in running}
        value = given.get(self._per, self._choose(trials, study))
        sub_study = self._sub_study(value, trials, study)
        fixed = {key: v for key, v in given.items() if key in self._distributions}
        if fixed:
            sub_study.enqueue_trial(fixed)
        # Where every candidate looks hopeless Optuna's GP divides by zero, and goes on with the
        # first one.
        with np.errstate(invalid="ignore", divide="ignore"):
            twin = sub_study.ask(dict(self._distributions))
        return {**twin.params, self._per: value}

    def _value(self, trial: FrozenTrial) -> Any:
        """The value of `per` that a trial has, or is going to have."""
        proposal = self._proposals.get(trial.number, {})
        fixed = trial.system_attrs.get("fixed_params", {})
        return {**proposal, **fixed, **trial.params}.get(self._per)

    def _choose(self, trials: Sequence[FrozenTrial], study: optuna.Study) -> Any:
        """The value of the next trial."""
        pulls = dict.fromkeys(self._values, 0)
        for trial in trials:
            value = self._value(trial)
            if value in pulls and trial.state != TrialState.WAITING:
                pulls[value] += 1
        fewest = min(self._values, key=lambda value: pulls[value])
        if pulls[fewest] < self._startup_each:
            return fewest
        sign = -1 if study.direction.name == "MAXIMIZE" else 1
        ended = [t for t in trials if t.state in _ENDED and self._value(t) in pulls]
        ended.sort(key=lambda trial: rank(trial, sign))
        good = dict.fromkeys(self._values, 0)
        for trial in ended[: math.ceil(len(ended) / GOOD_SHARE)]:
            good[self._value(trial)] += 1
        return threshold_ascent(pulls, good)

    def _sub_study(
        self, value: Any, trials: Sequence[FrozenTrial], study: optuna.Study
    ) -> optuna.Study:
        """The study of one value, made anew whenever a trial of it ended. Proposals for trials
        that run are in it already, as its own running trials."""
        own = [trial for trial in trials if self._value(trial) == value]
        ended = [trial for trial in own if trial.state in _ENDED]
        running = [trial for trial in own if trial.state == TrialState.RUNNING and trial.params]
        made_of = (len(ended), sum(t.number not in self._proposals for t in running))
        if value in self._studies and self._studies[value][0] == made_of:
            return self._studies[value][1]
        # Not of the value's name: hashes of texts change from one process to the next.
        seed = self._seed + SEED_STRIDE * (len(trials) + self._values.index(value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = self._build(seed % 2**32)
        sub_study = optuna.create_study(direction=study.direction, sampler=sampler)
        shown = selection(ended, study, NUM_SHOWN)
        finals = with_expected_gain(shown)
        known = [final for final in finals if final is not None]
        # The process wants the same constraints of every trial, and a value of those refused.
        names = {name: 0.0 for trial in shown for name in trial.constraints}
        for trial, final in zip(shown, finals, strict=True):
            if final is None and known and is_refused(trial):
                final = min(known) if study.direction.name == "MAXIMIZE" else max(known)
            if final is not None:
                sub_study.add_trial(self._complete(trial, TrialState.COMPLETE, final, names))
        for trial in running:
            sub_study.add_trial(self._complete(trial, TrialState.RUNNING, None))
        self._studies[value] = (made_of, sub_study)
        return sub_study

    def _complete(
        self,
        trial: FrozenTrial,
        state: TrialState,
        final: float | None,
        constraints: Mapping[str, float] | None = None,
    ) -> FrozenTrial:
        """A trial as a point of the whole space; `constraints`: those that are not known of it."""
        params = {**self._proposals.get(trial.number, {}), **trial.params}
        return create_trial(
            state=state,
            value=final,
            params={
                key: params[key] if key in trial.params else _neutral(distribution)
                for key, distribution in self._distributions.items()
            },
            distributions=dict(self._distributions),
            constraints={**(constraints or {}), **trial.constraints},
        )


def threshold_ascent(pulls: Mapping[Any, int], good: Mapping[Any, int]) -> Any:
    """The value from which the next of the best trials is most likely to come.

    Threshold Ascent (Streeter and Smith 2006, "A simple distribution-free approach to the max
    k-armed bandit problem"): of each value, an upper bound of its share of good trials, by
    Chernoff; the largest wins, the first of equals. It looks for the best trial, not for a good
    mean, and at ranks alone. Other than there, the number of good trials grows with the study, and
    trials that run count as tried, so that a round is spread.

    Args:
        pulls: trials by value, each at least 1.
        good: how many of them are among the best of all.
    """
    alpha = math.log(2 * sum(pulls.values()) * len(pulls) / CONFIDENCE)

    def bound(value: Any) -> float:
        share = good[value] / pulls[value]
        spread = math.sqrt(2 * pulls[value] * share * alpha + alpha**2)
        return share + (alpha + spread) / pulls[value]

    return max(pulls, key=bound)


def with_expected_gain(trials: Sequence[FrozenTrial]) -> list[float | None]:
    """What each ended trial reached, or would have reached had it not been pruned.

    To a pruned trial's last value is added the median gain from that step to the end of those that
    went on. Without this a Gaussian process, which knows no pruned trials, would learn from the
    few that ended by themselves. None: pruned before it had any value.
    """
    gains: dict[int, list[float]] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            for step, value in trial.intermediate_values.items():
                gains.setdefault(step, []).append(trial.value - value)
    final: list[float | None] = []
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            final.append(trial.value)
        elif not trial.intermediate_values:
            final.append(None)
        else:
            step = max(trial.intermediate_values)
            gain = statistics.median(gains[step]) if step in gains else 0.0
            final.append(trial.intermediate_values[step] + gain)
    return final


def values_of(space: SearchSpace, per: str) -> list[Any]:
    """The values, as Optuna stores them, of a parameter that every trial chooses."""
    chosen = [
        p.name
        for p in space.parameters.values()
        if len(p.branches) == 1
        and not p.branches[0].when
        and isinstance(p.branches[0].domain, Choice)
        and len(p.branches[0].domain.options) > 1
    ]
    if per not in chosen:
        raise InputError(
            f"per: {per} is no choice between values that every trial makes",
            where=f"{space.name}, sampler",
            hint=f"such parameters are here: {', '.join(chosen) or 'none'}",
        )
    return list(space.parameters[per].branches[0].stored_options())


def _neutral(distribution: BaseDistribution) -> Any:
    """The value of a parameter that does not apply."""
    match distribution:
        case CategoricalDistribution():
            return distribution.choices[0]
        case FloatDistribution(log=True):
            return math.sqrt(distribution.low * distribution.high)
        case IntDistribution(log=True):
            return round(math.sqrt(distribution.low * distribution.high))
        case IntDistribution() | FloatDistribution(step=float()):
            assert distribution.step is not None
            steps = (distribution.high - distribution.low) / distribution.step
            return distribution.low + round(steps / 2) * distribution.step
        case FloatDistribution():
            return (distribution.low + distribution.high) / 2
    raise TypeError(f"no such distribution is known: {distribution}")
