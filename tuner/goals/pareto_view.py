"""The Pareto front of a study as people see it: a table, a picture, and tags in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from core.encoding.shards import write_json
from core.report import Status

from ..studies.study import Study, TrialRecord, trial_records
from ..views.live import cost_text, percent, settings_line
from .pareto import joint_front

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace
    from ..tracking.tracker import Tracker

PICTURE = "pareto.png"
NUMBERS = "pareto.json"
MAX_LABELS = 12
"""Trials of the front whose numbers the picture shows."""


def record_front(parts: Sequence[Study], space: SearchSpace, tracker: Tracker) -> None:
    """Write the front of a study whose trials are over to its folder and to MLflow, where the runs
    of its trials are tagged.

    `parts`: the study; behind the probes that it goes on from, there is one front over both.
    """
    trials, folder = trials_of(parts), parts[-1].folder
    best = joint_front(trials, space)
    several = len(parts) > 1
    rows = [
        {
            **({"study": name} if several else {}),
            "trial": trial.number,
            space.objective: trial.value,
            **{cost: trial.metrics[cost] for cost in space.minimised},
        }
        for name, trial in best
    ]
    write_json(folder / NUMBERS, rows)
    draw_front(
        folder / PICTURE,
        [trial for _, own in trials for trial in own],
        [trial for _, trial in best],
        space,
        labels=labels_of(best) if several else None,
    )
    for name, _ in trials:
        tracker.mark_front([trial.number for study, trial in best if study == name], name)
    tracker.log_artifacts([folder / NUMBERS, folder / PICTURE])


def trials_of(parts: Sequence[Study]) -> list[tuple[str, tuple[TrialRecord, ...]]]:
    """Names and trials of a study's parts."""
    return [(part.record.name, tuple(trial_records(part.optuna(), part.space()))) for part in parts]


def labels_of(best: Sequence[tuple[str, TrialRecord]]) -> list[str]:
    """As `--pick` takes them: `STUDY/NUMBER`."""
    return [f"{name}/{trial.number}" for name, trial in best]


def front_table(
    best: Sequence[TrialRecord], space: SearchSpace, *, labels: Sequence[str] | None = None
) -> Table:
    """A row a trial of the front, best score first. `labels`: of the trials, where a number alone
    does not say which it is."""
    table = Table(
        title="Pareto front" if labels is None else "Pareto front of both parts",
        title_justify="left",
        header_style="bold",
        border_style="dim",
    )
    for name in ("trial", space.objective, *space.minimised):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("backbone", "settings"):
        table.add_column(name)
    for label, trial in zip(_labels(best, labels), best, strict=True):
        table.add_row(
            label,
            Text(percent(trial.value or 0.0), "green"),
            *(cost_text(trial.metrics[name]) for name in space.minimised),
            str(trial.settings.get("backbone", "")),
            settings_line(trial.settings),
        )
    return table


def draw_front(
    path: Path,
    trials: Sequence[TrialRecord],
    best: Sequence[TrialRecord],
    space: SearchSpace,
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """A PNG: the score over each cost, complete trials as dots, the front as a stepped line.
    `labels`: as for `front_table`."""
    # matplotlib's own canvas, without pyplot: no display, and no state of the process is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    complete = [t for t in trials if t.status == Status.COMPLETE and t.value is not None]
    figure = Figure(figsize=(6.4 * len(space.minimised), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(space.minimised), squeeze=False)[0]
    for axes, name in zip(panels, space.minimised, strict=True):
        axes.scatter(
            [t.metrics[name] for t in complete],
            [100 * (t.value or 0.0) for t in complete],
            s=14, color="0.7", label="complete trials",
        )  # fmt: skip
        line = sorted(best, key=lambda t: (t.metrics[name], t.value))
        costs = [t.metrics[name] for t in line]
        scores = [100 * (t.value or 0.0) for t in line]
        # With a second cost the front is a surface, of which this is one view.
        if len(space.minimised) == 1:
            axes.step(costs, scores, where="post", color="tab:blue", alpha=0.5)
        axes.scatter(costs, scores, s=36, color="tab:blue", label="Pareto front", zorder=3)
        axes.margins(x=0.08)
        for label, trial in list(zip(_labels(best, labels), best, strict=True))[:MAX_LABELS]:
            # Above and left of the front there is nothing.
            axes.annotate(
                label, (trial.metrics[name], 100 * (trial.value or 0.0)),
                xytext=(-4, 4), textcoords="offset points", ha="right",
            )  # fmt: skip
        axes.set_xlabel(f"{name}, less is better")
        axes.set_ylabel(f"{space.objective} on validation (%)")
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    figure.savefig(path, dpi=110)


def _labels(best: Sequence[TrialRecord], labels: Sequence[str] | None) -> Sequence[str]:
    return [str(trial.number) for trial in best] if labels is None else labels
