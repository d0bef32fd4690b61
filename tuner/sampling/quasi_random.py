"""A low-discrepancy sequence over a whole search space, conditions included.

Optuna's own QMC sampler learns the space from the trials there are; where parameters come and go
it starts another sequence for each set of them. Here every parameter has its coordinate from the
first trial on; those that do not exist beside the others are drawn and not used. A trial's place in
the sequence is its number, so that one that a kill cut off is proposed the same again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..spaces.domain import Branch, Choice, Range

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace


class QuasiRandomSampler(optuna.samplers.QMCSampler):
    """`sequence` is `sobol` or `halton`, scrambled by `seed`."""

    def __init__(self, space: SearchSpace, *, sequence: str, seed: int) -> None:
        super().__init__(
            qmc_type=sequence, scramble=True, seed=seed, warn_independent_sampling=False
        )
        self._distributions = {
            key: distribution
            for key, distribution in distributions_of(space).items()
            if not distribution.single()
        }

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._place = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        """Optuna counts in the study, where a kill makes it count a trial twice."""
        return self._place


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """All that any trial may ask Optuna for, by Optuna's names, in the order of the space."""
    branches = [branch for p in space.parameters.values() for branch in p.branches]
    found = {branch.key: _distribution(branch) for branch in branches}
    return {key: distribution for key, distribution in found.items() if distribution is not None}


def _distribution(branch: Branch) -> BaseDistribution | None:
    """What `branch.suggest` asks Optuna for; None for a constant, for which it asks nothing."""
    domain = branch.domain
    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution(branch.stored_options())
    if not isinstance(domain, Range):
        return None
    if domain.whole:
        return optuna.distributions.IntDistribution(
            int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1)
        )
    return optuna.distributions.FloatDistribution(
        domain.low, domain.high, log=domain.log, step=domain.step
    )
