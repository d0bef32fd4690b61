"""The searches that `bench_search_quality.py` compares, on problems that are looked up.

Ours: TPE and successive halving in the rounds of `tuner search` with one worker, where a round is
told as a whole before the next is asked (the hardest case). Ray's: OptunaSearch and ASHA
themselves, called as Tune's controller calls them, with two trials at a time and the same rungs,
without Ray's processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from search_problems import Problem

from tuner.sampling.pruners import build_pruner
from tuner.sampling.reproducible import reproducible_sampler
from tuner.sampling.rounds import round_size

WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Search:
    """What one search came to, its trials in order of their ends."""

    values: list[float] = field(default_factory=list)
    """The best value that each trial reported."""
    epochs: list[int] = field(default_factory=list)
    """The epochs that each trained."""

    def add(self, curve: np.ndarray, epochs: int) -> None:
        """A trial ended after so many epochs of its curve."""
        self.values.append(float(curve[:epochs].max()))
        self.epochs.append(epochs)


Method = Callable[[Problem, int, int], Search]
"""(problem, trials, seed) -> the search."""


def one_by_one(sampler: optuna.samplers.BaseSampler, problem: Problem, trials: int) -> Search:
    """Plain Optuna: ask, run to the end, tell."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    search = Search()
    for _ in range(trials):
        trial = study.ask()
        curve = problem.curve(problem.suggest(trial))
        search.add(curve, len(curve))
        study.tell(trial, search.values[-1])
    return search


def random_search(problem: Problem, trials: int, seed: int) -> Search:
    return one_by_one(optuna.samplers.RandomSampler(seed=seed), problem, trials)


def plain_tpe(problem: Problem, trials: int, seed: int) -> Search:
    return one_by_one(optuna.samplers.TPESampler(seed=seed), problem, trials)


def ours(problem: Problem, trials: int, seed: int) -> Search:
    """As `tuner.trials.searcher` does: a round is asked at once, and judged at each rung
    together."""
    space = problem.space
    study = optuna.create_study(
        direction="maximize",
        sampler=reproducible_sampler(space.sampler, space, seed),
        pruner=build_pruner(space.pruner, space.max_epochs),
    )
    search = Search()
    while len(search.values) < trials:
        asked = len(search.values)
        running = []
        for _ in range(min(round_size(space, asked), trials - asked)):
            trial = study.ask()
            running.append((trial, problem.curve(problem.suggest(trial))))
        for rung in problem.rungs:
            for trial, curve in running:
                trial.report(float(curve[rung - 1]), rung)
            stays = []
            for trial, curve in running:
                if trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    search.add(curve, rung)
                else:
                    stays.append((trial, curve))
            running = stays
        for trial, curve in running:
            search.add(curve, len(curve))
            study.tell(trial, search.values[-1])
    return search


def ray(problem: Problem, trials: int, seed: int) -> Search:
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
    search = Search()
    started = 0
    while len(search.values) < trials:
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
                search.add(running.pop(name), epochs[name])
    return search


METHODS: dict[str, Method] = {
    "random": random_search,
    "ours": ours,
    "TPE one by one": plain_tpe,
    "OptunaSearch + ASHA": ray,
}
