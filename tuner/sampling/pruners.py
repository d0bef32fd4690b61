"""Who stops trials: Optuna's pruners, and our own, by name.

One record a name in `PRUNERS`. Optuna is imported when one is built. Steps are epochs, counted
from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from .options import Options, check_name, check_options, one_objective_only

if TYPE_CHECKING:
    import optuna

FIRST_RUNG = 3
"""Successive halving begins after one in so many of the epochs. Sooner, warm-up and weight decay
mislead (`tests/benchmarks/README.md`, search quality)."""
WILCOXON_FACTOR = 3
"""Each of its rungs has so many times the epochs of the one before."""


@dataclass(frozen=True, kw_only=True)
class PrunerSpec:
    """A pruner by name, with the options that differ from its defaults."""

    name: str = "successive_halving"
    options: dict[str, Any] = field(default_factory=dict)


class HalvingOptions(Options):
    min_epochs: int | None = Field(
        default=None, ge=1, description="Epochs before the first rung; default: a third of all."
    )
    reduction_factor: int = Field(
        default=3, ge=2, description="One in this many trials passes each rung."
    )


class HyperbandOptions(Options):
    min_epochs: int | None = Field(
        default=None,
        ge=1,
        description="Epochs before the first rung of the bracket that stops soonest; default: a "
        "ninth of all.",
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
        raise one_objective_only("pruner", spec.name, PRUNERS, "build_front")
    return kind.build_front(options, max_epochs, minimised)


def rungs(spec: PrunerSpec, max_epochs: int) -> tuple[int, ...]:
    """The epochs after which trials may be stopped, ascending; the last epoch is none of them."""
    kind = PRUNERS[check_name("pruner", spec.name, PRUNERS)]
    epochs = kind.rungs(check_options("pruner", spec, kind.options), max_epochs)
    return tuple(sorted({epoch for epoch in epochs if epoch < max_epochs}))


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
    """Successive halving (Li et al. 2020) by ranks over all trials of the study: see `halving`."""
    from .halving import RungPruner

    return RungPruner(
        rungs=_halving_rungs(options, max_epochs), reduction_factor=options.reduction_factor
    )


def _halving_rungs(options: HalvingOptions, max_epochs: int) -> list[int]:
    """None in the second half but the first: to stop there saves little, and loses the end."""
    first = options.min_epochs or max(1, max_epochs // FIRST_RUNG)
    further = _geometric(first, options.reduction_factor, max_epochs // 2 + 1)
    return sorted({first, *further})


def _geometric(first: int, factor: int, below: int) -> Iterable[int]:
    epoch = first
    while epoch < below:
        yield epoch
        epoch *= factor


def _hyperband(options: HyperbandOptions, max_epochs: int) -> optuna.pruners.BasePruner:
    """Successive halving at several first rungs at once (Li et al. 2018)."""
    from optuna.pruners import HyperbandPruner

    first = min(_ninth(options, max_epochs), max_epochs)
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


def _ninth(options: HyperbandOptions | WilcoxonOptions, max_epochs: int) -> int:
    return options.min_epochs or max(1, max_epochs // 9)


def _hyperband_rungs(options: HyperbandOptions, max_epochs: int) -> Iterable[int]:
    return _geometric(_ninth(options, max_epochs), options.reduction_factor, max_epochs)


def _median_epochs(options: MedianOptions, max_epochs: int) -> Iterable[int]:
    return range(options.min_epochs + 1, max_epochs)


def _wilcoxon_epochs(options: WilcoxonOptions, max_epochs: int) -> Iterable[int]:
    """Few, as in successive halving: every further test is one more chance to err."""
    return _geometric(_ninth(options, max_epochs), WILCOXON_FACTOR, max_epochs)


def _no_epochs(options: Options, max_epochs: int) -> Iterable[int]:
    return ()


PRUNERS: dict[str, PrunerKind] = {
    "successive_halving": PrunerKind(
        options=HalvingOptions,
        build=_successive_halving,
        rungs=_halving_rungs,
        build_front=_successive_halving_of_fronts,
    ),
    "hyperband": PrunerKind(options=HyperbandOptions, build=_hyperband, rungs=_hyperband_rungs),
    "median": PrunerKind(options=MedianOptions, build=_median, rungs=_median_epochs),
    "wilcoxon": PrunerKind(
        options=WilcoxonOptions, build=_wilcoxon, rungs=_wilcoxon_epochs, by_fold=True
    ),
    "none": PrunerKind(
        options=Options, build=_no_pruner, rungs=_no_epochs, build_front=_no_pruner_of_fronts
    ),
}
