"""What is printed when something is done: the end of a search, lists of trials and spaces."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.report import Outcome, Status

from .live import percent, settings_line, trial_table
from .plan import make_plan
from .preparation import SearchRequest, prepare
from .space import SearchSpace, load_space, shipped_spaces
from .study import Study, TrialRecord, trial_records

if TYPE_CHECKING:
    from core.table_report import TableReport

    from .finalists import Winner
    from .home import Home
    from .search import SearchEnd
    from .winner import Result

SHOWN_BEST = 10


def print_end(end: SearchEnd, console: Console) -> None:
    """The best trials, the winner beside the prior baseline, and what to type next."""
    study = end.study
    space = study.space()
    if end.result is None:
        trials = tuple(trial_records(study.optuna(), space))
        console.print(_counts(trials), highlight=False)
        console.print(
            f"[bold]interrupted[/]: nothing is lost. Go on with: "
            f"[bold]tuner resume {study.record.name}[/]",
            highlight=False,
        )
        return
    result = end.result
    complete = [t for t in best_first(result.trials) if t.status == Status.COMPLETE]
    console.print(_counts(result.trials), highlight=False)
    console.print(record_table(complete[:SHOWN_BEST], space, end.floor))
    console.print(_winner_panel(result))
    console.print(_next_steps(result, study), highlight=False, soft_wrap=True)


def _winner_panel(result: Result) -> Panel:
    winner = result.winner
    scores = winner.evaluation
    lines = _grid()
    lines.add_row(
        "trial", f"{winner.number}: {winner.settings['backbone']}, {settings_line(winner.settings)}"
    )
    interval = f"{percent(scores['top3_accuracy_low'])} to {percent(scores['top3_accuracy_high'])}"
    accuracy = percent(scores["top3_accuracy"])
    lines.add_row("top3_accuracy on test", f"[bold]{accuracy}[/]  (95 % interval {interval})")
    gain = f"{100 * scores['gain']:+.1f} points"
    lines.add_row("prior baseline", f"{percent(scores['prior_baseline'])}  ({gain})")
    lines.add_row("mean average precision", percent(scores["mean_average_precision"]))
    lines.add_row("validation", _validation_line(winner))
    lines.add_row("model", f"[bold]{result.model_uri}[/]  (version {result.version})")
    if winner.learnt_nothing:
        warning = Text(
            "This model has learnt nothing that the test split can show: always answering the "
            "commonest classes is as good.",
            "bold red",
        )
        return Panel(Group(lines, warning), title="winner", border_style="red", expand=False)
    return Panel(lines, title="winner", border_style="green", expand=False)


def _grid() -> Table:
    """Names and values; a long address goes on in the next line instead of being cut off."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    return lines


def _validation_line(winner: Winner) -> str:
    first = winner.finalists[0]
    if len(first.values) == 1:
        return f"{percent(first.value)} in the search"
    return (
        f"{percent(first.value)} in the search, {percent(first.mean)} over {len(first.values)} new "
        f"seeds (optimism {100 * winner.optimism:+.1f} points, "
        f"best of {len(winner.finalists)} finalists)"
    )


def _next_steps(result: Result, study: Study) -> str:
    return (
        "Next:\n"
        "  tuner ui                                   browse the trials in MLflow\n"
        f"  tuner predict {result.model_uri} PICTURE...\n"
        f"  tuner trials {study.record.name}\n"
        "  tuner search probe --data YOUR_FOLDER      the same on your own pictures"
    )


def _counts(trials: Sequence[TrialRecord]) -> str:
    counts = Counter(trial.status for trial in trials)
    return f"{len(trials)} trials: " + ", ".join(f"{n} {status}" for status, n in counts.items())


def best_first(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials by value, then the others by number."""
    complete = [t for t in trials if t.status == Status.COMPLETE and t.value is not None]
    rest = [t for t in trials if t not in complete]
    return sorted(complete, key=lambda t: (-(t.value or 0.0), t.number)) + rest


def record_table(trials: Sequence[TrialRecord], space: SearchSpace, floor: float) -> Table:
    """Trials as Optuna remembers them, in the columns of the live table."""
    rows = [
        (t.number, t.settings, Outcome(
            status=Status.COMPLETE, best_value=t.value, best_epoch=t.best_epoch
        ))
        for t in trials
    ]  # fmt: skip
    return trial_table(rows, objective=space.objective, floor=floor)


def print_trials(study: Study, console: Console, *, as_json: bool) -> None:
    """All trials of a study, best first: a table, or JSON lines."""
    space = study.space()
    trials = best_first(tuple(trial_records(study.optuna(), space)))
    if as_json:
        for trial in trials:
            print(json.dumps(trial.to_dict()))
        return
    table = Table(header_style="bold", border_style="dim")
    for name in ("trial", "status", space.objective, "epoch"):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for name in ("backbone", "settings"):
        table.add_column(name)
    for trial in trials:
        settings = Text(settings_line(trial.settings))
        if trial.status == Status.FAILED:
            settings.append(f"\n{trial.reason}", "red")
        table.add_row(
            str(trial.number),
            trial.status,
            "-" if trial.value is None else percent(trial.value),
            f"{trial.best_epoch or '-'} of {trial.epochs or '-'}",
            str(trial.settings.get("backbone", "")),
            settings,
        )
    console.print(table)
    console.print(_counts(trials), highlight=False)


def print_spaces(console: Console) -> None:
    """The shipped spaces, a line each."""
    table = Table(box=None, header_style="bold")
    for name in ("space", "mode", "trials", "what it is"):
        table.add_column(name)
    for name in shipped_spaces():
        space = load_space(name)
        table.add_row(name, space.mode, str(space.trials), space.description)
    console.print(table)


def print_plan(request: SearchRequest, home: Home, console: Console) -> None:
    """`--dry-run`: what a search would do; everything is checked and nothing is written."""
    plan = make_plan(request.space, trials=request.trials, hours=request.hours)
    record, table, split = prepare(request, home, console)
    size = request.space.size()
    lines = _grid()
    lines.add_row("study", record.name)
    lines.add_row("table", f"{table.num_images:,} pictures, {table.num_classes} classes")
    parts = f"{len(split.train):,} train, {len(split.validation):,} validation"
    lines.add_row("split", f"{parts}, {len(split.test):,} test")
    number = "endlessly many" if size is None else f"{size:,}"
    lines.add_row("trials", f"{plan.trials} of {number} configurations")
    lines.add_row("sampler", f"{request.space.sampler.name}, pruner {request.space.pruner.name}")
    lines.add_row("features", "\n".join(r.label for r in plan.requests))
    lines.add_row("MLflow", record.tracking_uri)
    lines.add_row("model", record.model)
    console.print(lines, highlight=False)
    console.print("nothing was started (--dry-run)")


def print_table_report(report: TableReport, console: Console) -> None:
    """What `tuner data check` found."""
    values: dict[str, Any] = dataclasses.asdict(report)
    lines = _grid()
    lines.add_row("pictures", f"{report.num_images:,}")
    lines.add_row("labels", f"{report.num_labels:,} ({report.cardinality:.2f} a picture)")
    lines.add_row("without a label", f"{report.num_without_label:,}")
    lines.add_row("repeated ids", f"{len(report.repeated_ids):,}")
    groups = report.duplicate_groups
    shown = "; ".join(", ".join(group) for group in groups[:5])
    lines.add_row("near-duplicates", f"{len(groups)} groups" + (f": {shown}" if groups else ""))
    if values["given_split_counts"]:
        lines.add_row("given split", str(values["given_split_counts"]))
    if report.ignored_columns:
        lines.add_row("columns passed over", ", ".join(report.ignored_columns))
    console.print(lines, highlight=False)
    table = Table(header_style="bold", border_style="dim")
    table.add_column("class")
    table.add_column("pictures", justify="right")
    table.add_column("share", justify="right")
    for name, count in sorted(report.label_counts.items(), key=lambda item: -item[1]):
        style = "red" if count < 2 else ""
        table.add_row(name, f"{count:,}", percent(count / report.num_images), style=style)
    console.print(table)
