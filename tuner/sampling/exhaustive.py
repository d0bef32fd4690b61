"""A sampler that proposes every configuration of a finite space exactly once.

Optuna's grid takes the product of all parameters, those that do not apply included, and both its
grid and its brute force end the study by `study.stop()`, which fails under ask and tell. Here the
configurations are listed with their conditions, and a trial takes the next that no trial has.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from core.errors import InputError

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace

MAX_CONFIGURATIONS = 100_000
_INDEX = "configuration"
_logger = logging.getLogger(__name__)


class ExhaustiveSampler(optuna.samplers.BaseSampler):
    """Proposes the configurations of `space` in order, or shuffled by `shuffle_seed`.

    A configuration counts as taken once any trial, running, ended or failed, has its parameters;
    so a resumed study goes on where it stopped, and points enqueued by hand are not repeated.
    Ask for no more than `space.size()` trials: beyond it, configurations repeat, with a warning.

    Raises InputError if the space has no end, or more than MAX_CONFIGURATIONS.
    """

    def __init__(self, space: SearchSpace, *, shuffle_seed: int | None) -> None:
        endless = space.endless()
        if endless:
            raise InputError(
                f"{', '.join(endless)} can take endlessly many values, so that they can't be "
                "tried one by one",
                where=f"{space.name}, sampler",
                hint="give the range a step or choices, or use another sampler: tpe, random, qmc",
            )
        self._configurations = list(islice(space.configurations(), MAX_CONFIGURATIONS + 1))
        if len(self._configurations) > MAX_CONFIGURATIONS:
            raise InputError(
                f"the space has {space.size():,} configurations, more than "
                f"{MAX_CONFIGURATIONS:,}, too many to try one by one",
                where=f"{space.name}, sampler",
                hint="give it fewer values, or use another sampler: tpe, random, qmc",
            )
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(self._configurations)
        self._index_of = {_frozen(c): i for i, c in enumerate(self._configurations)}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Gives the trial the first configuration that no other trial has."""
        taken = self._taken(study, trial)
        total = len(self._configurations)
        index = next((i for i in range(total) if i not in taken), None)
        if index is None:
            index = trial.number % total
            if "fixed_params" not in trial.system_attrs:
                _logger.warning("All %d configurations are taken: one repeats.", total)
        study._storage.set_trial_system_attr(trial._trial_id, _INDEX, index)

    def _taken(self, study: Study, current: FrozenTrial) -> set[int]:
        taken = set()
        # The storage is asked directly, as pruners may hand in a study that filters its trials.
        for trial in study._storage.get_all_trials(study._study_id, deepcopy=False):
            if trial.number == current.number or trial.state == TrialState.WAITING:
                continue
            params = trial.params or trial.system_attrs.get("fixed_params", {})
            taken.add(self._index_of.get(_frozen(params), trial.system_attrs.get(_INDEX, -1)))
        return taken

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        configuration = self._configurations[trial.system_attrs[_INDEX]]
        if param_name in configuration:
            return configuration[param_name]
        # A point enqueued in part may lead where this configuration does not go.
        choices = getattr(param_distribution, "choices", None)
        return choices[0] if choices else getattr(param_distribution, "low")  # noqa: B009


def _frozen(params: dict[str, Any]) -> Sequence[Any]:
    return tuple(sorted((key, type(value).__name__, value) for key, value in params.items()))
