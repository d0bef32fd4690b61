"""What a person sees while a study runs: steps with progress, then a live table of trials.

On a terminal the table is redrawn in place; elsewhere (a log, CI) a line is printed now and then.
The view hears of trials as a `Watcher` and draws; it decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from core.report import Outcome, Status
from core.split import Split
from core.table import Table as Labelled

from .extraction import ExtractionProgress
from .space import SearchSpace

SHOWN_TRIALS = 10
LINE_SECONDS = 10.0
"""Between lines where there is no terminal."""
SHOWN_SETTINGS = (
    "backbone", "head", "hidden_sizes", "loss", "optimizer", "lr", "weight_decay",
    "unfrozen_stages",
)  # fmt: skip


class StudyView:
    """The screen of one study.

    Args:
        console: where to draw.
        space: whose searched parameters become columns.
        budget: trials in all.
        floor: the objective that always answering the commonest classes reaches.
    """

    def __init__(self, console: Console, space: SearchSpace, *, budget: int, floor: float) -> None:
        self.console = console
        self._objective = space.objective
        self._columns = shown_settings(space)
        self._budget = budget
        self._floor = floor
        self._started = time.monotonic()
        self._counts = dict.fromkeys(Status, 0)
        self._best: list[tuple[float, int, Mapping[str, Any], Outcome]] = []
        self._running: dict[int, tuple[int, float | None]] = {}
        self._already_done = 0
        self._last_line = 0.0

    def announce(self, name: str, table: Labelled, split: Split) -> None:
        """The first line: what is searched on what."""
        self.console.print(
            f"study [bold]{name}[/]: {table.num_images:,} pictures, {table.num_classes} classes; "
            f"{len(split.train):,} train, {len(split.validation):,} validation, "
            f"{len(split.test):,} test",
            highlight=False,
        )

    # ---- drawing --------------------------------------------------------------------------

    @contextmanager
    def showing(self, already_done: int = 0) -> Iterator[None]:
        """Draw until the block ends. `already_done`: trials of earlier sessions."""
        self._started = time.monotonic()
        self._already_done = already_done
        if not self.console.is_terminal:
            yield
            self._print_line(force=True)
            return
        with Live(
            get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True
        ):
            yield

    def render(self) -> RenderableType:
        """The status line and the best trials so far."""
        best = [(number, settings, outcome) for _, number, settings, outcome in self._best]
        table = trial_table(
            best[:SHOWN_TRIALS], columns=self._columns, objective=self._objective, floor=self._floor
        )
        return Group(self._status(), table)

    def _status(self) -> Text:
        done = self._done
        share = f"{done}/{self._budget} trials"
        parts = [f"{count} {status.value}" for status, count in self._counts.items() if count]
        if self._running:
            epochs = [epoch for epoch, _ in self._running.values()]
            parts.append(f"{len(self._running)} running (epoch {max(epochs)})")
        text = Text.assemble((share, "bold"), "   ", ", ".join(parts), f"   {self._time_left()}")
        text.append(f"   always the commonest classes: {percent(self._floor)}", "dim")
        return text

    @property
    def _done(self) -> int:
        return self._already_done + sum(self._counts.values())

    def _time_left(self) -> str:
        elapsed = time.monotonic() - self._started
        fresh = self._done - self._already_done
        if not fresh:
            return f"{duration(elapsed)} so far"
        left = elapsed / fresh * max(0, self._budget - self._done)
        return f"{duration(elapsed)} so far, about {duration(left)} left"

    def _print_line(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.console.is_terminal or (not force and now - self._last_line < LINE_SECONDS):
            return
        self._last_line = now
        best = (
            f", best {percent(self._best[0][0])} (trial {self._best[0][1]})" if self._best else ""
        )
        self.console.print(f"{self._status().plain}{best}", highlight=False, soft_wrap=True)

    # ---- a Watcher ------------------------------------------------------------------------

    def trial_started(self, number: int, settings: Mapping[str, Any]) -> None:
        self._running[number] = (0, None)

    def cohort_progress(
        self, numbers: Sequence[int], epoch: int, values: Mapping[int, float]
    ) -> None:
        for number in numbers:
            self._running[number] = (epoch, values.get(number))
        self._print_line()

    def trial_ended(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        self._running.pop(number, None)
        self._counts[outcome.status] += 1
        if outcome.best_value is not None and outcome.status is Status.COMPLETE:
            self._best.append((outcome.best_value, number, settings, outcome))
            self._best.sort(key=lambda entry: (-entry[0], entry[1]))
        self._print_line()


class ExtractionView:
    """Progress bars of feature extraction, one a backbone, workers added up."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._parts: dict[tuple[str, int], tuple[int, int]] = {}

    def __call__(self, news: ExtractionProgress) -> None:
        self._parts[news.label, news.worker] = (news.done, news.total)
        parts = [part for (label, _), part in self._parts.items() if label == news.label]
        done, total = (sum(column) for column in zip(*parts, strict=True))
        if news.label not in self._tasks:
            self._tasks[news.label] = self._progress.add_task(f"features of {news.label}")
        self._progress.update(self._tasks[news.label], completed=done, total=total)


def step_progress(console: Console) -> Progress:
    """Progress bars for the steps before trials; they stay on the screen."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeRemainingColumn(),
        console=console,
    )


def shown_settings(space: SearchSpace) -> list[str]:
    """The searched parameters worth a column."""
    return [name for name in SHOWN_SETTINGS if name in space.parameters]


def trial_table(
    trials: Sequence[tuple[int, Mapping[str, Any], Outcome]],
    *,
    columns: Sequence[str],
    objective: str,
    floor: float,
) -> Table:
    """The best trials, best first. A value at or below `floor` is red: it has learnt nothing."""
    table = Table(title_justify="left", header_style="bold", border_style="dim")
    table.add_column("trial", justify="right")
    table.add_column(objective, justify="right")
    table.add_column("best epoch", justify="right")
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold")
    for number, settings, outcome in trials:
        value = outcome.best_value
        style = "red" if value is None or value <= floor else "green"
        table.add_row(
            str(number),
            Text("-" if value is None else percent(value), style),
            str(outcome.best_epoch or "-"),
            *(setting_text(settings.get(name)) for name in columns),
        )
    return table


def setting_text(value: Any) -> str:
    """A setting as a table shows it; a parameter that the trial does not have is empty."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "-".join(str(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
