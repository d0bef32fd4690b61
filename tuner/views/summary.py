"""What is printed when something is done: the end of a search, lists of trials and spaces."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.report import Outcome, Status

from ..budgets.quote_view import truth_text
from ..finalists.view import finalist_table, model_lines
from ..goals.costs import COSTS
from ..goals.pareto import joint_front
from ..goals.pareto_view import PICTURE, front_table, labels_of, trials_of
from ..spaces.space import SearchSpace, load_space, shipped_spaces
from ..studies.study import Study, TrialRecord, trial_records
from .live import cost_text, percent, settings_line, trial_table

if TYPE_CHECKING:
    from core.data.table_report import TableReport

    from ..finalists.winner import Result
    from ..search import SearchEnd

SHOWN_BEST = 10
SHOWN_OF_PART = 5
"""Best trials shown of a study, and of each part of one that has two."""


def print_end(end: SearchEnd, console: Console) -> None:
    """The best trials, the winner beside the prior baseline, and what to type next."""
    study = end.study
    if end.result is None:
        for part in (end.study, end.finetune):
            if part is not None:
                console.print(_part_counts(part), highlight=False)
        console.print(
            f"[bold]interrupted[/]: nothing is lost. Go on with: "
            f"[bold]tuner resume {study.record.name}[/]",
            highlight=False,
        )
        return
    result = end.result
    for part in (end.study, end.finetune):
        if part is not None:
            _print_best(part, end, console)
    _print_front([part for part in (end.study, end.finetune) if part is not None], console)
    console.print(finalist_table(result.winner))
    last = end.finetune or study
    console.print(_winner_panel(result, last.record.name, two_parts=last is not study))
    truth = truth_text([part for part in (end.study, end.finetune) if part is not None])
    if truth:
        console.print(truth, highlight=False, soft_wrap=True)
    console.print(_next_steps(result, study), highlight=False, soft_wrap=True)


def _print_best(study: Study, end: SearchEnd, console: Console) -> None:
    """A part's counts, and its best trials."""
    space = study.space()
    trials = best_first(tuple(trial_records(study.optuna(), space)))
    complete = [t for t in trials if t.status == Status.COMPLETE]
    shown = SHOWN_BEST if end.finetune is None else SHOWN_OF_PART
    console.print(_part_counts(study), highlight=False)
    console.print(record_table(complete[:shown], space, end.floor))


def _print_front(parts: Sequence[Study], console: Console) -> None:
    """The Pareto front over a study's parts, if it has several objectives."""
    space = parts[-1].space()
    if not space.minimised:
        return
    best = joint_front(trials_of(parts), space)
    labels = labels_of(best) if len(parts) > 1 else None
    console.print(front_table([trial for _, trial in best], space, labels=labels))
    path, name = parts[-1].folder / PICTURE, parts[0].record.name
    pick = f"tuner resume {name} --pick TRIAL"
    console.print(f"[dim]picture: {path}; another of them: {pick}[/]", soft_wrap=True)


def _winner_panel(result: Result, study: str, *, two_parts: bool) -> Panel:
    """`study`: the one that `result.trials` are of."""
    winner = result.winner
    number = f"{winner.number} of {winner.study}" if two_parts else str(winner.number)
    scores = winner.evaluation
    lines = _grid()
    lines.add_row(
        "trial", f"{number}: {winner.settings['backbone']}, {settings_line(winner.settings)}"
    )
    interval = f"{percent(scores['top3_accuracy_low'])} to {percent(scores['top3_accuracy_high'])}"
    accuracy = percent(scores["top3_accuracy"])
    lines.add_row("top3_accuracy on test", f"[bold]{accuracy}[/]  (95 % interval {interval})")
    gain = f"{100 * scores['gain']:+.1f} points"
    lines.add_row("prior baseline", f"{percent(scores['prior_baseline'])}  ({gain})")
    lines.add_row("mean average precision", percent(scores["mean_average_precision"]))
    costs = {t.number: t.metrics for t in result.trials if study == winner.study}
    for name in COSTS:
        if name in costs.get(winner.number, {}):
            lines.add_row(name, cost_text(costs[winner.number][name]))
    for name, text in model_lines(winner):
        lines.add_row(name, text)
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


def _part_counts(study: Study) -> str:
    """`_counts` of a study, with its name where it is one of two parts."""
    space = study.space()
    counts = _counts(tuple(trial_records(study.optuna(), space)))
    two_parts = study.record.after is not None or space.finetune is not None
    return f"{study.record.name}: {counts}" if two_parts else counts


def best_first(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials by value, then the others by number."""
    complete = [t for t in trials if t.status == Status.COMPLETE and t.value is not None]
    rest = [t for t in trials if t not in complete]
    return sorted(complete, key=lambda t: (-(t.value or 0.0), t.number)) + rest


def record_table(trials: Sequence[TrialRecord], space: SearchSpace, floor: float) -> Table:
    """Trials as Optuna remembers them, in the columns of the live table."""
    rows = [
        (t.number, t.settings, Outcome(
            status=Status.COMPLETE, best_value=t.value, best_epoch=t.best_epoch,
            best_metrics=t.metrics,
        ))
        for t in trials
    ]  # fmt: skip
    return trial_table(rows, objective=space.objective, floor=floor, costs=space.costs)


def print_trials(parts: Sequence[Study], console: Console, *, as_json: bool) -> None:
    """All trials of a study's parts, best first: a table each, or JSON lines, which name the
    study where there are two."""
    fronts = _fronts(parts)
    for study in parts:
        space = study.space()
        trials = best_first(tuple(trial_records(study.optuna(), space)))
        on_front = fronts[study.record.name]
        if as_json:
            name = {"study": study.record.name} if len(parts) > 1 else {}
            for trial in trials:
                place = {"front": trial.number in on_front} if space.minimised else {}
                print(json.dumps(name | trial.to_dict() | place))
            continue
        console.print(_trials_table(trials, space, on_front))
        console.print(_part_counts(study), highlight=False)


def _fronts(parts: Sequence[Study]) -> dict[str, set[int]]:
    """Of each part, the numbers of its trials on the Pareto front over all; none in a study of one
    objective."""
    space = parts[-1].space()
    best = joint_front(trials_of(parts), space) if space.minimised else []
    return {
        part.record.name: {trial.number for name, trial in best if name == part.record.name}
        for part in parts
    }


def _trials_table(
    trials: Sequence[TrialRecord], space: SearchSpace, on_front: Collection[int]
) -> Table:
    table = Table(header_style="bold", border_style="dim")
    for name in ("trial", "status", space.objective, *space.costs, "epoch"):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for name in ("backbone", "settings"):
        table.add_column(name)
    for trial in trials:
        settings = Text(settings_line(trial.settings))
        if trial.status in (Status.FAILED, Status.INFEASIBLE):
            colour = "red" if trial.status == Status.FAILED else "yellow"
            settings.append(f"\n{trial.reason}", colour)
        table.add_row(
            str(trial.number),
            f"{trial.status}, front" if trial.number in on_front else trial.status,
            "-" if trial.value is None else percent(trial.value),
            *(cost_text(trial.metrics.get(name)) for name in space.costs),
            f"{trial.best_epoch or '-'} of {trial.epochs or '-'}",
            str(trial.settings.get("backbone", "")),
            settings,
        )
    return table


def print_spaces(console: Console) -> None:
    """The shipped spaces, a line each."""
    table = Table(box=None, header_style="bold")
    for name in ("space", "mode", "trials", "what it is"):
        table.add_column(name)
    for name in shipped_spaces():
        space = load_space(name)
        modes = ", ".join(part.mode for part in space.parts)
        trials = " + ".join(str(part.trials) for part in space.parts)
        table.add_row(name, modes, trials, space.description)
    console.print(table)


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
