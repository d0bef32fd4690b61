"""How many trials a search needs: our default against random, plain TPE, and Ray's own pairing.

No trial is trained: `search_problems.py` looks results up. Everybody searches the same problem with
the same 20 seeds; a pruned trial counts as one. Ours: TPE and successive halving in the rounds of
`tuner search` with one worker, where a round is told as a whole before the next is asked (the
hardest case). Ray's: OptunaSearch and ASHA themselves, called as Tune's controller calls them, with
two trials at a time and the same rungs, without Ray's processes. Bar: ours reaches what random
search reaches on average with all its trials with at most a third of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from measuring import Bench, benchmark, console, show, verdict
from search_problems import Problem, problems

from tuner.sampling.registry import build_pruner
from tuner.sampling.reproducible import reproducible_sampler
from tuner.sampling.rounds import round_size

TRIALS, SEEDS = 200, 20
WORKERS = 2
ROUNDING = 1e-12
Method = Callable[[Problem, int, int], list[float]]
"""(problem, trials, seed) -> the best value that each trial reported, in order of their ends."""


def one_by_one(sampler: optuna.samplers.BaseSampler, problem: Problem, trials: int) -> list[float]:
    """Plain Optuna: ask, run to the end, tell."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    values = []
    for _ in range(trials):
        trial = study.ask()
        value = float(problem.curve(problem.suggest(trial)).max())
        study.tell(trial, value)
        values.append(value)
    return values


def random_search(problem: Problem, trials: int, seed: int) -> list[float]:
    return one_by_one(optuna.samplers.RandomSampler(seed=seed), problem, trials)


def plain_tpe(problem: Problem, trials: int, seed: int) -> list[float]:
    return one_by_one(optuna.samplers.TPESampler(seed=seed), problem, trials)


def ours(problem: Problem, trials: int, seed: int) -> list[float]:
    """As `tuner.trials.searcher` does: a round is asked at once, and judged at each rung
    together."""
    space = problem.space
    study = optuna.create_study(
        direction="maximize",
        sampler=reproducible_sampler(space.sampler, space, seed),
        pruner=build_pruner(space.pruner, space.max_epochs),
    )
    values: list[float] = []
    while len(values) < trials:
        count = min(round_size(space, len(values)), trials - len(values))
        running = []
        for _ in range(count):
            trial = study.ask()
            running.append((trial, problem.curve(problem.suggest(trial))))
        for rung in problem.rungs:
            for trial, curve in running:
                trial.report(float(curve[rung - 1]), rung)
            stays = []
            for trial, curve in running:
                if trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    values.append(float(curve[:rung].max()))
                else:
                    stays.append((trial, curve))
            running = stays
        for trial, curve in running:
            study.tell(trial, float(curve.max()))
            values.append(float(curve.max()))
    return values


def ray(problem: Problem, trials: int, seed: int) -> list[float]:
    """OptunaSearch and ASHA, each trial an epoch at a time, two trials in turns."""
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def define(trial: optuna.Trial) -> None:
        given[trial.number] = problem.suggest(trial)

    given: dict[int, Any] = {}
    searcher = OptunaSearch(space=define, metric="value", mode="max", seed=seed)
    max_epochs = problem.space.max_epochs if problem.rungs else 1
    grace = problem.rungs[0] if problem.rungs else 1
    scheduler = ASHAScheduler(
        metric="value", mode="max", max_t=max_epochs, grace_period=grace, reduction_factor=3
    )
    running: dict[str, np.ndarray] = {}
    epochs: dict[str, int] = {}
    values: list[float] = []
    started = 0
    while len(values) < trials:
        while len(running) < WORKERS and started < trials:
            name = f"trial-{started}"
            searcher.suggest(name)
            running[name] = problem.curve(given[started])
            epochs[name] = 0
            scheduler.on_trial_add(None, SimpleNamespace(trial_id=name))
            started += 1
        for name in list(running):
            epochs[name] += 1
            value = float(running[name][epochs[name] - 1])
            result = {"value": value, "training_iteration": epochs[name]}
            trial = SimpleNamespace(trial_id=name)
            last = epochs[name] == len(running[name])
            if not last:
                searcher.on_trial_result(name, result)
            if last or scheduler.on_trial_result(None, trial, result) == "STOP":
                scheduler.on_trial_complete(None, trial, result)
                searcher.on_trial_complete(name, result)
                values.append(float(running.pop(name)[: epochs[name]].max()))
    return values


METHODS: dict[str, Method] = {
    "random": random_search,
    "ours": ours,
    "TPE one by one": plain_tpe,
    "OptunaSearch + ASHA": ray,
}


def best_so_far(problem: Problem, method: Method, trials: int, seeds: int) -> np.ndarray:
    """[seeds, trials]."""
    runs = [method(problem, trials, seed) for seed in range(seeds)]
    return np.maximum.accumulate(np.array(runs), axis=1)


def compare(problem: Problem, bench: Bench) -> dict[str, Any]:
    """The curves of all methods on a problem, printed."""
    trials, seeds = bench.size(TRIALS, 40), bench.size(SEEDS, 2)
    curves, rows = {}, []
    for name, method in METHODS.items():
        began = time.perf_counter()
        curves[name] = best_so_far(problem, method, trials, seeds)
        seconds = (time.perf_counter() - began) / trials / seeds
        target = curves["random"][:, -1].mean()
        reached = np.flatnonzero(curves[name].mean(0) >= target - ROUNDING)
        third = curves[name][:, trials // 3 - 1]
        rows.append(
            {
                "method": name,
                f"best of {trials // 3}": float(third.mean()),
                f"best of {trials}": float(curves[name][:, -1].mean()),
                "spread": float(curves[name][:, -1].std(ddof=1)),
                "trials for random's best": int(reached[0]) + 1 if len(reached) else None,
                "ms a trial": 1000 * seconds,
            }
        )
    show(f"{problem.name}: means of {seeds} seeds", rows)
    return {"problem": problem.name, "rows": rows, "curves": curves}


def behind(curves: dict[str, np.ndarray]) -> float:
    """By how many standard errors of the difference the best other method ends better than ours."""

    def far(name: str) -> float:
        ends, ours_ends = curves[name][:, -1], curves["ours"][:, -1]
        error = np.sqrt((ends.var(ddof=1) + ours_ends.var(ddof=1)) / len(ends))
        return float((ends.mean() - ours_ends.mean()) / max(error, ROUNDING))

    return max(far(name) for name in curves if name != "ours")


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Mean and spread (one standard deviation) of the best so far, a panel a problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    for place, result in enumerate(results):
        axes = figure.add_subplot(1, len(results), place + 1)
        for name, runs in result["curves"].items():
            mean, spread = runs.mean(0), runs.std(0)
            numbers = np.arange(1, runs.shape[1] + 1)
            (line,) = axes.plot(numbers, mean, label=name)
            axes.fill_between(
                numbers, mean - spread, mean + spread, alpha=0.15, color=line.get_color()
            )
        low = min(runs.mean(0)[9] for runs in result["curves"].values())
        high = max((runs.mean(0) + runs.std(0))[-1] for runs in result["curves"].values())
        axes.set(title=result["problem"], xlabel="trials", ylabel="best so far", ylim=(low, high))
        axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    purpose = "trials that a search needs for random search's best"
    with benchmark("search_quality", purpose) as bench:
        found, notes = problems(bench.quick)
        for what, note in notes.items():
            console.print(f"{what}: {note}")
        results = [compare(problem, bench) for problem in found]
        bench.figures["notes"] = notes
        bench.figures["problems"] = [
            {**result, "curves": {n: c.mean(0).tolist() for n, c in result["curves"].items()}}
            for result in results
        ]
        if bench.json is not None:
            plot(results, bench.json.with_suffix(".png"))
        bench.figures["not_worse"] = [
            verdict(
                f"{result['problem']}: standard errors behind the best other",
                figure=behind(result["curves"]),
                at_most=2,
            )
            for result in results
        ]
        bench.figures["met"] = [
            verdict(
                f"{result['problem']}: share of random's trials",
                figure=(result["rows"][1]["trials for random's best"] or np.inf)
                / result["curves"]["random"].shape[1],
                at_most=1 / 3,
            )
            for result in results
        ]


if __name__ == "__main__":
    main()
