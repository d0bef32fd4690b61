"""Who is first in wall time: our service, or a search that a person writes on the same features.

Heads of the shipped space `probe` are trained on the cached features of two of its backbones.
Every method has the same machine for the same time, one after the other, and the same pictures,
epochs and metric: random search and plain TPE one by one, OptunaSearch with ASHA (`by_hand.py`),
and ours as `tuner search` runs it, journal, outcome log and MLflow included. Features are there
before; Ray runs already. The target is what random search reaches in its time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import optuna
import ours
from by_hand import Data, Ends
from measuring import Bench, benchmark, console, poster_table, show, verdict, weights_at_hand

from tuner.sampling.pruners import rungs
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace, load_space
from tuner.studies.outcomes import OutcomeLog
from tuner.trials.cluster import Workers, cluster
from tuner.trials.context import FeatureRequest

BACKBONES = ["squeezenet1_1", "mobilenet_v2"]
NUM_IMAGES, SECONDS, SEEDS = 3000, 150, 3
TRIALS = 100_000
"""More than the time allows: it is the budget."""
VALIDATION_SHARE = 3
"""One picture in so many validates: more than in a search, so that the scores are smoother."""
Runs = dict[str, list[Ends]]


def search_space() -> SearchSpace:
    """`probe` without the backbone that is a file of its own and without its first point, of
    which the others know nothing."""
    values = load_space("probe").to_dict()
    values["parameters"]["backbone"] = BACKBONES
    values.pop("points")
    return parse_space(values | {"trials": TRIALS})


def split_of(num_images: int) -> Any:
    from core.data.split import Split

    rows = np.random.default_rng(0).permutation(num_images)
    validation, train = np.split(rows, [num_images // VALIDATION_SHARE])
    # Nothing is scored on test rows here.
    return Split(
        seed=0, train=np.sort(train), validation=np.sort(validation), test=np.array([], int)
    )


def data_of(prepared: ours.Prepared, features: Mapping[FeatureRequest, str]) -> Data:
    """The features as a script of one's own would load them: in memory, scaled once."""
    split = prepared.context.split
    scaled = {}
    for request, folder in features.items():
        matrix = np.load(Path(folder) / "matrix.npy").astype(np.float32)
        train_ND = matrix[split.train]
        spread_D = np.maximum(train_ND.std(0), 1e-6)
        scaled[request.backbone] = (matrix - train_ND.mean(0)) / spread_D
    return Data(
        features=scaled,
        targets_NC=prepared.context.table.targets_NC.astype(np.float32),
        train=split.train,
        validation=split.validation,
    )


def our_search(
    prepared: ours.Prepared,
    features: Mapping[FeatureRequest, str],
    workers: Workers,
    seconds: float,
) -> Ends:
    began = time.time()
    timed = dataclasses.replace(
        prepared, plan=dataclasses.replace(prepared.plan, deadline=began + seconds)
    )
    ours.run(timed, features, workers)
    ended = OutcomeLog(prepared.study.folder).read().values()
    return sorted((trial.outcome.ended - began, trial.outcome.best_value or 0.0) for trial in ended)


def all_runs(bench: Bench, table: Any, split: Any, seconds: float, seeds: int) -> Runs:
    """Every method once a seed. What needs Ray goes first; the others have the machine alone."""
    space = search_space()
    runs: Runs = {"random": [], "ours": [], "TPE one by one": [], "OptunaSearch + ASHA": []}
    with cluster("local") as workers:
        for seed in range(seeds):
            folder = bench.scratch / f"seed-{seed}"
            own = dataclasses.replace(bench, scratch=folder)
            prepared = ours.prepare(own, space, table, split, workers, seed=seed)
            if seed == 0:
                features = ours.extract_features(prepared, workers)
                data = data_of(prepared, features)
            runs["ours"].append(our_search(prepared, features, workers, seconds))
            runs["OptunaSearch + ASHA"].append(
                by_hand.ray_search(
                    space,
                    data,
                    folder / "ray",
                    seconds=seconds,
                    seed=seed,
                    rungs=rungs(space.pruner, space.max_epochs) or (space.max_epochs,),
                    workers=workers.num_threads,
                )
            )
    samplers = {
        "random": optuna.samplers.RandomSampler,
        "TPE one by one": optuna.samplers.TPESampler,
    }
    for name, build in samplers.items():
        for seed in range(seeds):
            found = by_hand.one_by_one(build(seed=seed), space, data, seconds=seconds)
            runs[name].append(found)
    return runs


def best_at(ends: Ends, times: np.ndarray) -> np.ndarray:
    """The best value so far at each of these seconds; 0 before a trial ended."""
    ended = np.array([second for second, _ in ends])
    values = np.maximum.accumulate([0.0, *(value for _, value in ends)])
    return np.asarray(values[np.searchsorted(ended, times, side="right")])


def rows_of(runs: Runs, times: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row a method, and its mean best so far at each of the times."""
    curves = {
        name: np.mean([best_at(ends, times) for ends in many], axis=0)
        for name, many in runs.items()
    }
    target = curves["random"][-1]
    rows = []
    for name, many in runs.items():
        reached = np.flatnonzero(curves[name] >= target - 1e-12)
        rows.append(
            {
                "method": name,
                "trials": float(np.mean([sum(s <= times[-1] for s, _ in e) for e in many])),
                "best": float(curves[name][-1]),
                "seconds to random's best": float(times[reached[0]]) if len(reached) else None,
            }
        )
    return rows, curves


def plot(curves: Mapping[str, np.ndarray], runs: Runs, times: np.ndarray, file: Path) -> None:
    """Mean best so far against seconds, each seed's own as a thin line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, mean in curves.items():
        (line,) = axes.step(times, mean, where="post", linewidth=2, label=name)
        for ends in runs[name]:
            own = best_at(ends, times)
            axes.step(times, own, where="post", linewidth=0.6, alpha=0.5, color=line.get_color())
    target = curves["random"][-1]
    axes.axhline(target, linestyle=":", color="gray", linewidth=1, label="random's best")
    settled = [mean[len(times) // 10] for mean in curves.values()]
    low = min((value for value in settled if value > 0), default=0.0)
    high = max(mean[-1] for mean in curves.values())
    pad = 0.1 * max(high - low, 1e-3)
    axes.set(xlabel="seconds", ylabel="best validation top3_accuracy so far")
    axes.set(xlim=(0, times[-1]), ylim=(low - pad, high + pad))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with benchmark(
        "search_time", "seconds until random search's best, all on one machine"
    ) as bench:
        num_images = bench.size(NUM_IMAGES, 240)
        seconds, seeds = bench.size(SECONDS, 10), bench.size(SEEDS, 1)
        table, what = poster_table(bench, num_images)
        _, _, weights = weights_at_hand()
        split = split_of(num_images)
        console.print(
            f"{what}, {weights}: {len(split.train)} train, {len(split.validation)} validate; "
            f"{seconds} s a method, {seeds} seeds"
        )
        runs = all_runs(bench, table, split, seconds, seeds)
        times = np.linspace(0, seconds, 10 * seconds + 1)
        rows, curves = rows_of(runs, times)
        show(f"means of {seeds} seeds, {seconds} s each", rows)
        bench.figures.update(rows=rows, runs=runs, data=what)
        if bench.json is not None:
            plot(curves, runs, times, bench.json.with_suffix(".png"))
        needed = {row["method"]: row["seconds to random's best"] or np.inf for row in rows}
        others = min(value for name, value in needed.items() if name != "ours")
        bench.figures["met"] = verdict(
            "seconds to random's best over those of the quickest other",
            figure=needed["ours"] / others,
            at_most=1,
        )


if __name__ == "__main__":
    main()
