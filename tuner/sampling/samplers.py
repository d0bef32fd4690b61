"""Who proposes trials: Optuna's samplers by name.

One record a name in `SAMPLERS`. Optuna is imported when one is built. `grid` and `brute_force` are
our own sampler, since Optuna's stop the study by a call that fails under ask and tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.errors import InputError

from .options import Options, check_name, check_options, one_objective_only

if TYPE_CHECKING:
    import optuna

    from ..spaces.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """A sampler by name, with the options that differ from its defaults."""

    name: str = "tpe"
    options: dict[str, Any] = field(default_factory=dict)


_STARTUP = "Trials drawn at random before the sampler learns from them."


class StartupOptions(Options):
    startup_trials: int = Field(default=20, ge=1, description=_STARTUP)


class TpeOptions(StartupOptions):
    startup_trials: int = Field(default=14, ge=1, description=_STARTUP)
    candidates: int = Field(
        default=24, ge=1, description="Points drawn a trial, of which the most promising is taken."
    )


class GpOptions(StartupOptions):
    per: str | None = Field(
        default=None,
        description="A parameter, such as backbone, of which each value gets a Gaussian process of "
        "its own; a bandit shares the trials among them.",
    )


class QmcOptions(Options):
    sequence: Literal["sobol", "halton"] = Field(
        default="sobol", description="The low-discrepancy sequence."
    )


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """A sampler: its options, and how to build it from them, the space and a seed."""

    options: type[Options]
    build: Callable[[Any, SearchSpace, int], optuna.samplers.BaseSampler]
    learns: bool = True
    """Whether what trials came to changes what it proposes; else a round may be of any size."""
    several_objectives: bool = True
    """Whether it can search for a Pareto front."""
    one_sequence: bool = False
    """Whether it walks through one sequence, of which the storage knows its place."""


def build_sampler(spec: SamplerSpec, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """The Optuna sampler for a study over `space`; the same seed proposes the same trials.

    Raises InputError for an unknown name or option, or a space that the sampler cannot search.
    """
    kind = SAMPLERS[check_name("sampler", spec.name, SAMPLERS)]
    options = check_options("sampler", spec, kind.options)
    if space.minimised and not kind.several_objectives:
        raise one_objective_only("sampler", spec.name, SAMPLERS, "several_objectives")
    with warnings.catch_warnings():
        from optuna.exceptions import ExperimentalWarning

        warnings.simplefilter("ignore", ExperimentalWarning)
        return kind.build(options, space, seed)


def _tpe(options: TpeOptions, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimators (Bergstra et al. 2011). `group`: a joint model for each
    set of parameters that occur together; `constant_liar`: a cohort's trials keep apart. Of a
    long study it sees a part: `bounded`."""
    from optuna.samplers import TPESampler

    from .bounded import BoundedSampler

    def build(seed: int) -> optuna.samplers.BaseSampler:
        return TPESampler(
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=options.startup_trials,
            n_ei_candidates=options.candidates,
            seed=seed,
        )

    return BoundedSampler(build, seed=seed)


def _random(options: Options, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _gp(options: GpOptions, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """Gaussian process with log expected improvement, over the parameters that all trials share;
    those under a condition are drawn by TPE. With `per`: one for each value: `per_backbone`."""
    from optuna.samplers import GPSampler, TPESampler

    if options.per is not None:
        if space.minimised:
            raise InputError(
                "per: the sub-studies know one objective only",
                where="sampler",
                hint="leave per out, or have one objective",
            )
        return _gp_per_value(options.per, options, space, seed)

    def build(seed: int) -> optuna.samplers.BaseSampler:
        return GPSampler(
            n_startup_trials=options.startup_trials,
            independent_sampler=TPESampler(seed=seed, n_startup_trials=options.startup_trials),
            warn_independent_sampling=False,
            seed=seed,
        )

    if not space.constraints:
        return build(seed)
    from ..goals.refused import with_refused
    from .bounded import BoundedSampler

    return BoundedSampler(build, seed=seed, as_shown=with_refused)


def _gp_per_value(
    per: str, options: GpOptions, space: SearchSpace, seed: int
) -> optuna.samplers.BaseSampler:
    from optuna.samplers import GPSampler

    from .per_backbone import PerValueSampler, values_of

    if space.minimised:
        raise InputError(
            "with `per` it knows one objective only",
            where="sampler",
            hint="leave `per` out, or take tpe",
        )
    startup_each = max(1, options.startup_trials // len(values_of(space, per)))

    def build(seed: int) -> optuna.samplers.BaseSampler:
        return GPSampler(n_startup_trials=startup_each, warn_independent_sampling=False, seed=seed)

    return PerValueSampler(space, per=per, build=build, startup_each=startup_each, seed=seed)


def _cmaes(options: StartupOptions, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """CMA-ES (Hansen) over the numbers that all trials share; choices and parameters under a
    condition are drawn by TPE."""
    from optuna.samplers import CmaEsSampler, TPESampler

    return CmaEsSampler(
        n_startup_trials=options.startup_trials,
        independent_sampler=TPESampler(seed=seed, n_startup_trials=options.startup_trials),
        warn_independent_sampling=False,
        seed=seed,
    )


def _qmc(options: QmcOptions, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """A scrambled low-discrepancy sequence: covers the space more evenly than chance."""
    from .quasi_random import QuasiRandomSampler

    return QuasiRandomSampler(space, sequence=options.sequence, seed=seed)


def _grid(options: Options, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """Every configuration once, in the order of the file, the last parameter fastest."""
    from .exhaustive import ExhaustiveSampler

    return ExhaustiveSampler(space, shuffle_seed=None)


def _brute_force(options: Options, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """Every configuration once, in an order shuffled by the seed: a part of it is a fair part."""
    from .exhaustive import ExhaustiveSampler

    return ExhaustiveSampler(space, shuffle_seed=seed)


SAMPLERS: dict[str, SamplerKind] = {
    "tpe": SamplerKind(options=TpeOptions, build=_tpe),
    "random": SamplerKind(options=Options, build=_random, learns=False),
    "gp": SamplerKind(options=GpOptions, build=_gp),
    "cmaes": SamplerKind(options=StartupOptions, build=_cmaes, several_objectives=False),
    "qmc": SamplerKind(options=QmcOptions, build=_qmc, learns=False, one_sequence=True),
    "grid": SamplerKind(options=Options, build=_grid, learns=False, one_sequence=True),
    "brute_force": SamplerKind(
        options=Options, build=_brute_force, learns=False, one_sequence=True
    ),
}
