"""A sampler whose proposals for a trial depend on the study, its seed and the trial's number alone.

Optuna's samplers draw from a stream of random numbers that goes on from trial to trial, so a study
that was killed and resumed would draw others than one that was not. Here each trial has a sampler
of its own, seeded by its number, and one that was cut off in the middle of its proposals is given
the same again. With one worker a resumed study then proposes what an undisturbed one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from .bounded import BoundedSampler
from .samplers import SAMPLERS, SamplerSpec, build_sampler

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from ..spaces.space import SearchSpace

NUMBER_STRIDE = 7919
"""Between the seeds of one trial and the next: samplers add small numbers to theirs."""
MAX_SEED = 2**32


def reproducible_sampler(spec: SamplerSpec, space: SearchSpace, seed: int) -> BaseSampler:
    """`build_sampler`, made reproducible. One that walks through a sequence is so already: the
    storage knows its place, and another seed would be another sequence.

    Raises what `build_sampler` does."""
    first = build_sampler(spec, space, seed)
    if SAMPLERS[spec.name].one_sequence:
        return first
    if isinstance(first, BoundedSampler):
        return ReproducibleSampler(first.seeded, seed=seed)
    return ReproducibleSampler(lambda own: build_sampler(spec, space, own), seed=seed)


class ReproducibleSampler(BaseSampler):
    """Samples each trial as `build(seed of its number)` does that has sampled no other.

    Trials must be asked for and all their parameters suggested one after the other: what a trial
    is proposed may depend on what those that run have. A trial of an earlier session is shown to
    its sampler as it was when it was asked for, without the parameters that it has by now.
    """

    def __init__(self, build: Callable[[int], BaseSampler], *, seed: int) -> None:
        self._build = build
        self._seed = seed
        self._number = -1
        self._sampler: BaseSampler | None = None
        self._relative_space: dict[str, BaseDistribution] = {}
        self._relative: dict[str, Any] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        self._sampler_of(study, trial)
        return self._relative_space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._sampler_of(study, trial)
        return self._relative

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._sampler_of(study, trial)
        others: Any = _Others(study, trial.number)
        return sampler.sample_independent(others, _bare(trial), param_name, param_distribution)

    def _sampler_of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        """The trial's sampler, after it has sampled what the trial has already."""
        if self._sampler is None or trial.number != self._number:
            self._number = trial.number
            seed = (self._seed + NUMBER_STRIDE * trial.number) % MAX_SEED
            self._sampler = self._build(seed)
            bare = _bare(trial)
            others: Any = _Others(study, trial.number)
            self._sampler.before_trial(others, bare)
            self._relative_space = self._sampler.infer_relative_search_space(others, bare)
            self._relative = self._sampler.sample_relative(others, bare, self._relative_space)
            fixed = trial.system_attrs.get("fixed_params", {})
            for name, distribution in trial.distributions.items():
                # Of these Optuna asked the sampler nothing.
                if name in self._relative or name in fixed or distribution.single():
                    continue
                self._sampler.sample_independent(others, bare, name, distribution)
        return self._sampler


class _Others:
    """A study without the trial that is sampled: a second time, what is left of the first one in
    the storage must not count as a trial beside it (as Optuna's GP has it)."""

    def __init__(self, study: optuna.Study, number: int) -> None:
        self._study = study
        self._number = number

    def get_trials(self, *args: Any, **options: Any) -> list[FrozenTrial]:
        trials = self._study.get_trials(*args, **options)
        return [trial for trial in trials if trial.number != self._number]

    def _get_trials(self, *args: Any, **options: Any) -> list[FrozenTrial]:
        trials = self._study._get_trials(*args, **options)
        return [trial for trial in trials if trial.number != self._number]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def _bare(trial: FrozenTrial) -> FrozenTrial:
    """The trial as it was when it was asked for."""
    bare = copy.copy(trial)
    bare.distributions = {}
    bare.params = {}
    return bare
