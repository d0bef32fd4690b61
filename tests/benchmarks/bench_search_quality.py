"""How many trials a search needs: our default against random, plain TPE, and Ray's own pairing.

No trial is trained: `search_problems.py` looks results up, and `search_methods.py` searches.
Everybody searches the same problem with the same 20 seeds. A pruned trial counts as one; what it
saves shows in the epochs that were trained, the second axis, where a problem has learning curves.
Bar: ours reaches what random search reaches on average with all its trials with at most a third of
them, and does not end worse than any other.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from measuring import Bench, benchmark, console, show, verdict
from search_methods import METHODS, Method
from search_problems import Problem, problems

TRIALS, SEEDS = 200, 20
SHARE = 3
"""One in so many of random's trials is the bar."""
ROUNDING = 1e-12
SETTLED = 20
"""Trials after which curves are in the picture; where ours has ended its first round."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A method on a problem: the best value so far, by trials and by epochs."""

    best: np.ndarray
    """[seeds, trials]: after each trial."""
    epochs: np.ndarray
    """[seeds, trials]: epochs trained until then."""

    @property
    def by_epochs(self) -> np.ndarray:
        """[seeds, epochs that every seed trained]: after each epoch; NaN before a trial ended."""
        grid = np.arange(1, self.epochs[:, -1].min() + 1)
        rows = []
        for best, epochs in zip(self.best, self.epochs, strict=True):
            ended = np.searchsorted(epochs, grid, side="right")
            rows.append(np.where(ended > 0, best[ended - 1], np.nan))
        return np.array(rows)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All methods on a problem."""

    problem: str
    curves: dict[str, Curves]
    rows: list[dict[str, Any]]
    has_epochs: bool
    """Whether the problem knows learning curves, so that pruning saves something."""

    @property
    def target(self) -> float:
        """Random search's mean best with all its trials."""
        return float(self.curves["random"].best[:, -1].mean())


def search(problem: Problem, method: Method, trials: int, seeds: int) -> Curves:
    runs = [method(problem, trials, seed) for seed in range(seeds)]
    return Curves(
        best=np.maximum.accumulate([run.values for run in runs], axis=1),
        epochs=np.cumsum([run.epochs for run in runs], axis=1),
    )


def first_at(means: np.ndarray, target: float) -> int | None:
    """How many trials, or epochs, until the mean reaches the target."""
    reached = np.flatnonzero(means >= target - ROUNDING)  # False for NaN.
    return int(reached[0]) + 1 if len(reached) else None


def compare(problem: Problem, bench: Bench) -> Result:
    """The curves of all methods on a problem, printed."""
    trials, seeds = bench.size(TRIALS, 40), bench.size(SEEDS, 2)
    curves: dict[str, Curves] = {}
    rows = []
    for name, method in METHODS.items():
        began = time.perf_counter()
        curves[name] = found = search(problem, method, trials, seeds)
        seconds = (time.perf_counter() - began) / trials / seeds
        target = float(curves["random"].best[:, -1].mean())
        row = {
            "method": name,
            f"best of {trials // SHARE}": float(found.best[:, trials // SHARE - 1].mean()),
            f"best of {trials}": float(found.best[:, -1].mean()),
            "spread": float(found.best[:, -1].std(ddof=1)),
            "trials to random's best": first_at(found.best.mean(0), target),
        }
        if problem.rungs:
            row["epochs to it"] = first_at(found.by_epochs.mean(0), target)
            row["epochs a trial"] = float(found.epochs[:, -1].mean()) / trials
        rows.append(row | {"ms a trial": 1000 * seconds})
    show(f"{problem.name}: means of {seeds} seeds", rows)
    return Result(problem=problem.name, curves=curves, rows=rows, has_epochs=bool(problem.rungs))


def behind(curves: dict[str, Curves]) -> float:
    """By how many standard errors of the difference the best other method ends better than ours."""

    def far(name: str) -> float:
        ends, ours_ends = curves[name].best[:, -1], curves["ours"].best[:, -1]
        error = np.sqrt((ends.var(ddof=1) + ours_ends.var(ddof=1)) / len(ends))
        return float((ends.mean() - ours_ends.mean()) / max(error, ROUNDING))

    return max(far(name) for name in curves if name != "ours")


def plot(results: list[Result], file: Path) -> None:
    """Mean and spread (one standard deviation) of the best so far: a panel a problem by trials, and
    one more by epochs where there are learning curves."""
    from matplotlib.figure import Figure

    panels = [(result, epochs) for result in results for epochs in (False, True)
              if result.has_epochs or not epochs]  # fmt: skip
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * height + 0.4), layout="constrained")
    for place, (result, epochs) in enumerate(panels):
        panel(figure.add_subplot(height, columns, place + 1), result, epochs)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(file, dpi=120)


def panel(axes: Any, result: Result, by_epochs: bool) -> None:
    lows, highs = [], []
    for name, found in result.curves.items():
        values = found.by_epochs if by_epochs else found.best
        mean, spread = values.mean(0), values.std(0)
        numbers = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(numbers, mean, label=name, linewidth=2.2 if name == "ours" else 1.4,
                            zorder=3 if name == "ours" else 2)  # fmt: skip
        axes.fill_between(
            numbers, mean - spread, mean + spread, alpha=0.12, linewidth=0, color=line.get_color()
        )
        lows.append(found.best.mean(0)[min(SETTLED, found.best.shape[1]) - 1])
        highs.append((mean + spread)[-1])
    trials = result.curves["random"].best.shape[1]
    axes.axhline(result.target, color="gray", linestyle=":", linewidth=1)
    if not by_epochs:
        axes.axvline(trials / SHARE, color="gray", linestyle=":", linewidth=1)
    else:
        axes.set_xscale("log")
        axes.set_xlim(left=100)
    what = "epochs trained" if by_epochs else "trials"
    axes.set(title=result.problem, xlabel=what, ylabel="best so far")
    margin = 0.03 * (max(highs) - min(lows))
    axes.set_ylim(min(lows) - margin, max(highs) + margin)
    axes.spines[["top", "right"]].set_visible(False)


def as_figures(result: Result) -> dict[str, Any]:
    """What the JSON keeps of a problem."""
    curves = {name: found.best.mean(0).tolist() for name, found in result.curves.items()}
    epochs = {name: found.epochs.mean(0).tolist() for name, found in result.curves.items()}
    return {"problem": result.problem, "rows": result.rows, "curves": curves, "epochs": epochs}


def judge(result: Result) -> dict[str, bool]:
    """Whether the bars are met."""
    ours = next(row for row in result.rows if row["method"] == "ours")
    trials = result.curves["random"].best.shape[1]
    return {
        "third": verdict(
            f"{result.problem}: share of random's trials",
            figure=(ours["trials to random's best"] or np.inf) / trials,
            at_most=1 / SHARE,
        ),
        "not_worse": verdict(
            f"{result.problem}: standard errors behind the best other",
            figure=behind(result.curves),
            at_most=2,
        ),
    }


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
        bench.figures["problems"] = [as_figures(result) for result in results]
        if bench.json is not None and results:
            plot(results, bench.json.with_suffix(".png"))
        bench.figures["met"] = {result.problem: judge(result) for result in results}


if __name__ == "__main__":
    main()
