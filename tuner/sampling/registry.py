"""Who proposes trials and who stops them: Optuna's samplers and pruners by name.

One record a name: its options (a pydantic model, which also feeds the JSON schema) and the function
that builds it. Optuna is imported when one is built. `grid` and `brute_force` are our own sampler,
since Optuna's stop the study by a call that fails under ask and tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.errors import InputError

from ..spaces.source import Source, validated

if TYPE_CHECKING:
    import optuna

    from ..spaces.space import SearchSpace

WILCOXON_FACTOR = 3
"""Each of its rungs has so many times the epochs of the one before."""


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """A sampler by name, with the options that differ from its defaults."""

    name: str = "tpe"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PrunerSpec:
    """A pruner by name, with the options that differ from its defaults."""

    name: str = "successive_halving"
    options: dict[str, Any] = field(default_factory=dict)


class Options(BaseModel):
    """Options of a sampler or pruner; none by default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StartupOptions(Options):
    startup_trials: int = Field(
        default=20, ge=1, description="Trials drawn at random before the sampler learns from them."
    )


class TpeOptions(StartupOptions):
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


class HalvingOptions(Options):
    min_epochs: int | None = Field(
        default=None, ge=1, description="Epochs before the first rung; default: a ninth of all."
    )
    reduction_factor: int = Field(
        default=3, ge=2, description="One in this many trials passes each rung."
    )


class MedianOptions(Options):
    startup_trials: int = Field(
        default=8, ge=1, description="Trials that must end before any is stopped."
    )
    min_epochs: int = Field(default=3, ge=1, description="Epochs that every trial may run.")


class WilcoxonOptions(Options):
    p_threshold: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="A trial stops where the test finds it worse than the best at this level.",
    )
    min_epochs: int | None = Field(
        default=None, ge=1, description="Epochs before the first test; default: a ninth of all."
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


@dataclass(frozen=True, kw_only=True)
class PrunerKind:
    """A pruner: its options, how to build it from them and the most epochs of any trial, and the
    epochs after which it can stop a trial (at others it need not be asked)."""

    options: type[Options]
    build: Callable[[Any, int], optuna.pruners.BasePruner]
    rungs: Callable[[Any, int], Iterable[int]]
    by_fold: bool = False
    """Whether it reads what a trial reaches on each fold: see `wilcoxon`."""
    build_front: Callable[[Any, int, Sequence[str]], optuna.pruners.BasePruner] | None = None
    """The same for several objectives, of which the last argument names those to minimise; None:
    it judges by one alone."""


def build_sampler(spec: SamplerSpec, space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """The Optuna sampler for a study over `space`; the same seed proposes the same trials.

    Raises InputError for an unknown name or option, or a space that the sampler cannot search.
    """
    kind = SAMPLERS[check_name("sampler", spec.name, SAMPLERS)]
    options = check_options("sampler", spec, kind.options)
    if space.minimised and not kind.several_objectives:
        raise _one_objective_only("sampler", spec.name, SAMPLERS, "several_objectives")
    with warnings.catch_warnings():
        from optuna.exceptions import ExperimentalWarning

        warnings.simplefilter("ignore", ExperimentalWarning)
        return kind.build(options, space, seed)


def build_pruner(
    spec: PrunerSpec, max_epochs: int, *, minimised: Sequence[str] = ()
) -> optuna.pruners.BasePruner:
    """The Optuna pruner for trials of up to `max_epochs`; steps are epochs, counted from 1.

    `minimised`: the costs that are objectives beside the first. Raises InputError for an unknown
    name or option, or a pruner that cannot judge by all objectives.
    """
    kind = PRUNERS[check_name("pruner", spec.name, PRUNERS)]
    options = check_options("pruner", spec, kind.options)
    if not minimised:
        return kind.build(options, max_epochs)
    if kind.build_front is None:
        raise _one_objective_only("pruner", spec.name, PRUNERS, "build_front")
    return kind.build_front(options, max_epochs, minimised)


def rungs(spec: PrunerSpec, max_epochs: int) -> tuple[int, ...]:
    """The epochs after which trials may be stopped, ascending; the last epoch is none of them."""
    kind = PRUNERS[check_name("pruner", spec.name, PRUNERS)]
    epochs = kind.rungs(check_options("pruner", spec, kind.options), max_epochs)
    return tuple(sorted({epoch for epoch in epochs if epoch < max_epochs}))


def _one_objective_only(
    what: str, name: str, registry: Mapping[str, Any], capability: str
) -> InputError:
    able = [other for other, kind in registry.items() if getattr(kind, capability)]
    return InputError(
        f"{name} knows one objective only",
        where=what,
        hint=f"with several objectives: {', '.join(able)}",
    )


def check_name(what: str, name: str, registry: dict[str, Any], source: Source | None = None) -> str:
    """`name` if the registry holds it, else InputError with those it does hold."""
    if name not in registry:
        raise (source or Source(name="search space")).unknown(what, name, registry, what)
    return name


def check_options(
    what: str,
    spec: SamplerSpec | PrunerSpec,
    model: type[Options],
    source: Source | None = None,
) -> Options:
    """The options of a spec, complete with defaults, or InputError for one that does not fit."""
    return validated(model, spec.options, source or Source(name="search space"), what)


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


def _no_pruner(options: Options, max_epochs: int) -> optuna.pruners.BasePruner:
    from optuna.pruners import NopPruner

    return NopPruner()


def _no_pruner_of_fronts(
    options: Options, max_epochs: int, minimised: Sequence[str]
) -> optuna.pruners.BasePruner:
    return _no_pruner(options, max_epochs)


def _successive_halving_of_fronts(
    options: HalvingOptions, max_epochs: int, minimised: Sequence[str]
) -> optuna.pruners.BasePruner:
    """Successive halving by fronts (Schmucker et al. 2021): see `pareto_pruning`."""
    from .pareto_pruning import FrontPruner

    return FrontPruner(
        rungs=_halving_rungs(options, max_epochs),
        reduction_factor=options.reduction_factor,
        costs=minimised,
    )


def _successive_halving(options: HalvingOptions, max_epochs: int) -> optuna.pruners.BasePruner:
    """Successive halving (Li et al. 2020) by ranks over all trials of the study: see `pruning`."""
    from .pruning import RungPruner

    return RungPruner(
        rungs=_halving_rungs(options, max_epochs), reduction_factor=options.reduction_factor
    )


def _halving_rungs(options: HalvingOptions, max_epochs: int) -> list[int]:
    epochs = [_first_rung(options, max_epochs)]
    while epochs[-1] * options.reduction_factor < max_epochs:
        epochs.append(epochs[-1] * options.reduction_factor)
    return epochs


def _hyperband(options: HalvingOptions, max_epochs: int) -> optuna.pruners.BasePruner:
    """Successive halving at several first rungs at once (Li et al. 2018)."""
    from optuna.pruners import HyperbandPruner

    first = min(_first_rung(options, max_epochs), max_epochs)
    return HyperbandPruner(
        min_resource=first, max_resource=max_epochs, reduction_factor=options.reduction_factor
    )


def _median(options: MedianOptions, max_epochs: int) -> optuna.pruners.BasePruner:
    """Stops a trial whose best score so far is below the median of the others at that epoch."""
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials=options.startup_trials, n_warmup_steps=options.min_epochs)


def _wilcoxon(options: WilcoxonOptions, max_epochs: int) -> optuna.pruners.BasePruner:
    """Stops what a signed-rank test over the folds finds worse than the best: see `wilcoxon`."""
    from .wilcoxon import FoldPruner

    return FoldPruner(p_threshold=options.p_threshold)


def _first_rung(options: HalvingOptions | WilcoxonOptions, max_epochs: int) -> int:
    return options.min_epochs or max(1, max_epochs // 9)


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


def _median_epochs(options: MedianOptions, max_epochs: int) -> Iterable[int]:
    return range(options.min_epochs + 1, max_epochs)


def _wilcoxon_epochs(options: WilcoxonOptions, max_epochs: int) -> Iterable[int]:
    """Few, as in successive halving: every further test is one more chance to err."""
    epoch = _first_rung(options, max_epochs)
    while epoch < max_epochs:
        yield epoch
        epoch *= WILCOXON_FACTOR


def _no_epochs(options: Options, max_epochs: int) -> Iterable[int]:
    return ()


PRUNERS: dict[str, PrunerKind] = {
    "successive_halving": PrunerKind(
        options=HalvingOptions,
        build=_successive_halving,
        rungs=_halving_rungs,
        build_front=_successive_halving_of_fronts,
    ),
    "hyperband": PrunerKind(options=HalvingOptions, build=_hyperband, rungs=_halving_rungs),
    "median": PrunerKind(options=MedianOptions, build=_median, rungs=_median_epochs),
    "wilcoxon": PrunerKind(
        options=WilcoxonOptions, build=_wilcoxon, rungs=_wilcoxon_epochs, by_fold=True
    ),
    "none": PrunerKind(
        options=Options, build=_no_pruner, rungs=_no_epochs, build_front=_no_pruner_of_fronts
    ),
}
