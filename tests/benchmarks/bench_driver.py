"""Bar 6: the driver's memory and the time it takes to ask for and tell trials, in a long study.

The real searcher, sampler, pruner, journal and outcome log; cohorts are "trained" instantly by a
channel that answers at once, so that nothing but the driver's own work is seen. No Ray, no MLflow.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any

import optuna
from measuring import Bench, benchmark, console, resident_mib, show, verdict

from core.report import Outcome, Status
from tuner.sampling.pruners import build_pruner
from tuner.sampling.reproducible import reproducible_sampler
from tuner.spaces.space import SearchSpace, load_space
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.plan import Plan, make_plan
from tuner.studies.storage import open_storage
from tuner.studies.study import OUTCOME, outcome_attribute
from tuner.trials.searcher import Budget, CohortSearcher

METRICS = ("train_loss", "train_top3_accuracy", "validation_loss", "validation_top3_accuracy", "lr")


class InstantChannel:
    """A channel without an actor."""

    def __init__(self) -> None:
        self._rulings: dict[tuple[str, int], tuple[int, ...]] = {}
        self._deliveries: dict[str, list[Any]] = {}

    def rule(self, cohort: str, epoch: int, places: Iterable[int]) -> None:
        self._rulings[cohort, epoch] = tuple(places)

    def ruling(self, cohort: str, epoch: int) -> tuple[int, ...]:
        return self._rulings.pop((cohort, epoch), ())

    def deliver(self, cohort: str, item: Any) -> None:
        self._deliveries.setdefault(cohort, []).append(item)

    def collect(self, cohort: str) -> list[Any]:
        return self._deliveries.pop(cohort, [])


class Clock:
    """Time spent in the driver, by part."""

    def __init__(self) -> None:
        self.seconds = {"ask": 0.0, "judge": 0.0, "tell": 0.0}

    def __call__(self, part: str, job: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = job(*arguments)
        self.seconds[part] += time.perf_counter() - started
        return result


def end_of(rng: random.Random, epochs: int, *, pruned: bool) -> Outcome:
    curve = tuple({name: rng.random() for name in METRICS} for _ in range(epochs))
    best = max(metrics["validation_top3_accuracy"] for metrics in curve)
    return Outcome(
        status=Status.PRUNED if pruned else Status.COMPLETE,
        reason=f"pruned at epoch {epochs}" if pruned else "",
        curve=curve,
        best_epoch=1,
        best_value=best,
        best_metrics={} if pruned else {f"validation_metric_{i}": rng.random() for i in range(3)},
        seconds=1.0,
    )


def run_cohort(
    searcher: CohortSearcher,
    channel: InstantChannel,
    clock: Clock,
    tune_id: str,
    rungs: tuple[int, ...],
    rng: random.Random,
) -> int:
    """Ask for a cohort, report it at every rung, deliver its outcomes; returns its size."""
    job = clock("ask", searcher.suggest, tune_id)
    if not isinstance(job, dict):
        return 0
    ends = [trial["epochs"] for trial in job["trials"]]
    running = list(range(len(ends)))
    for epoch in rungs:
        result = {"epoch": epoch, "places": running, "values": [rng.random() for _ in running]}
        clock("judge", searcher.on_trial_result, tune_id, result)
        stops = channel.ruling(job["cohort"], epoch)
        for place in stops:
            ends[place] = -epoch
        running = [place for place in running if place not in stops]
    outcomes = [end_of(rng, abs(end), pruned=end < 0) for end in ends]
    channel.deliver(job["cohort"], outcomes)
    clock("tell", searcher.on_trial_complete, tune_id, {})
    return len(outcomes)


def fill(
    study: optuna.Study, space: SearchSpace, rungs: tuple[int, ...], count: int, rng: random.Random
) -> None:
    """Add ended trials as a study keeps them, drawn at random, a third of them pruned at each
    rung: running 10,000 trials for real is mostly waiting for the journal's disk."""
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=rng.randrange(2**31)))
    for _ in range(count):
        trial = drawn.ask()
        space.suggest(trial)
        reached = [epoch for i, epoch in enumerate(rungs) if rng.random() < 1 / 3**i]
        pruned = len(reached) < len(rungs)
        outcome = end_of(rng, reached[-1] if pruned else space.max_epochs, pruned=pruned)
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.PRUNED
                if pruned
                else optuna.trial.TrialState.COMPLETE,
                value=None if pruned else outcome.best_value,
                params=trial.params,
                distributions=trial.distributions,
                intermediate_values={epoch: rng.random() for epoch in reached},
                user_attrs={OUTCOME: outcome_attribute(outcome)},
            )
        )


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Figures of the last trials before each milestone; those before are filled in."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    milestones = [100, 300] if bench.quick else [1_000, 5_000, 10_000]
    window, seconds = bench.size(256, 64), bench.size(60, 15)
    space = load_space("probe")
    plan = make_plan(space, trials=milestones[-1], hours=None)
    study = optuna.create_study(
        storage=open_storage(None, bench.scratch),
        sampler=reproducible_sampler(space.sampler, space, 0),
        pruner=build_pruner(space.pruner, space.max_epochs),
        direction="maximize",
    )
    rng = random.Random(0)
    rows = []
    for milestone in milestones:
        num_before = len(study.get_trials(deepcopy=False))
        fill(study, space, plan.rungs, milestone - window - num_before, rng)
        rows.append(run_window(bench, study, space, plan, milestone, seconds, rng))
    return rows


def run_window(
    bench: Bench,
    study: optuna.Study,
    space: SearchSpace,
    plan: Plan,
    milestone: int,
    seconds: float,
    rng: random.Random,
) -> dict[str, Any]:
    """Really run trials up to the milestone, or for so long."""
    channel, clock = InstantChannel(), Clock()
    searcher = CohortSearcher(
        study,
        space,
        budget=Budget(trials=milestone),
        features=dict.fromkeys(plan.requests, "nowhere"),
        channel=channel,  # type: ignore[arg-type]
        log=OutcomeLog(bench.scratch),
        watchers=[],
        seed=0,
        rungs=plan.rungs,
    )
    started = time.perf_counter()
    counted = cohorts = 0
    while searcher.has_work and time.perf_counter() - started < seconds:
        tune_id = f"tune-{milestone}-{cohorts}"
        counted += run_cohort(searcher, channel, clock, tune_id, plan.rungs, rng)
        cohorts += 1
    each = {part: 1000 * spent / counted for part, spent in clock.seconds.items()}
    return {
        "trials": milestone,
        "timed": counted,
        **{f"{part}, ms": ms for part, ms in each.items()},
        "ask + tell, ms": each["ask"] + each["tell"],
        "RSS, MiB": resident_mib(),
    }


def main() -> None:
    with benchmark("driver", "10,000 trials in one study, sampler TPE") as bench:
        before = resident_mib()
        rows = measure(bench)
        show(f"a trial, after so many; RSS at the start: {before:.0f} MiB", rows)
        bench.figures["rows"] = rows
        bench.figures["met"] = [
            verdict("driver RSS, GiB", figure=rows[-1]["RSS, MiB"] / 1024, at_most=1.5),
            verdict("asking + telling, ms a trial", figure=rows[-1]["ask + tell, ms"], at_most=100),
        ]
        console.print("judge: the pruner compares every trial at every rung with all before it")


if __name__ == "__main__":
    main()
