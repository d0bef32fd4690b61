"""What a person sees while trials run: a live table of the best, progress and the time left.

On a terminal the table is redrawn in place; elsewhere (a log, CI) a line is printed now and then.
The view hears of trials as a `Watcher` and draws; it decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.data.split import Split
from core.data.table import Table as Labelled
from core.report import Outcome, Status

from ..budgets.device_time import DeviceMeter
from ..spaces.space import SearchSpace
from ..studies.outage import away_line, back_line
from ..studies.outcomes import EndedTrial
from .steps import LINE_SECONDS, duration

SHOWN_TRIALS = 10
SHOWN_SETTINGS = (
    "head", "hidden_sizes", "loss", "optimizer", "lr", "weight_decay", "unfrozen_stages",
)  # fmt: skip
"""Beside the backbone, what the table shows of a trial's settings."""
NAMED_SETTINGS = {"lr": "lr", "weight_decay": "wd", "unfrozen_stages": "stages"}
"""Numbers that need a name to be understood, with a short one."""


class StudyView:
    """The screen of one study.

    Args:
        console: where to draw.
        space: what is searched.
        budget: trials in all.
        floor: the objective that always answering the commonest classes reaches.
        meter: counts the device time; None: it is not limited.
    """

    def __init__(
        self,
        console: Console,
        space: SearchSpace,
        *,
        budget: int,
        floor: float,
        meter: DeviceMeter | None = None,
    ) -> None:
        self.console = console
        self._objective = space.objective
        self._costs = space.costs
        self._budget = budget
        self._floor = floor
        self._started = time.monotonic()
        self._counts = dict.fromkeys(Status, 0)
        self._best: list[tuple[float, int, Mapping[str, Any], Outcome]] = []
        self._running: dict[int, tuple[int, float | None]] = {}
        self._already_done = 0
        self._last_line = 0.0
        self._storage_away: float | None = None
        self._meter = meter
        self.tracking_away: Callable[[], str] = str
        """Asked for a line about MLflow; empty while that answers."""

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
    def showing(self, earlier: Iterable[EndedTrial] = ()) -> Iterator[None]:
        """Draw until the block ends. `earlier`: trials that ended in earlier sessions."""
        for trial in earlier:
            self.trial_ended(trial.number, trial.settings, trial.outcome)
        self._started = time.monotonic()
        self._already_done = self._done
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
            best[:SHOWN_TRIALS], objective=self._objective, floor=self._floor, costs=self._costs
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
        if self._storage_away is not None:
            away = duration(time.monotonic() - self._storage_away)
            text.append(f"   storage away for {away}", "yellow")
        if tracking := self.tracking_away():
            text.append(f"   {tracking}", "yellow")
        if self._meter is not None and self._meter.text():
            text.append(f"   {self._meter.text()}")
        text.append(f"   always the commonest classes: {percent(self._floor)}", "dim")
        return text

    @property
    def _done(self) -> int:
        return sum(self._counts.values())

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

    # ---- an OutageWatcher -------------------------------------------------------------------

    def storage_away(self, seconds: float, reason: str) -> None:
        if self._storage_away is None:
            self._storage_away = time.monotonic() - seconds
            self.console.print(away_line(reason), style="yellow", highlight=False, markup=False)

    def storage_back(self, seconds: float) -> None:
        self._storage_away = None
        self.console.print(back_line(seconds), style="green", highlight=False, markup=False)

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


def trial_table(
    trials: Sequence[tuple[int, Mapping[str, Any], Outcome]],
    *,
    objective: str,
    floor: float,
    costs: Sequence[str] = (),
) -> Table:
    """The best trials, best first. A value at or below `floor` is red: it has learnt nothing.
    `costs`: further columns."""
    table = Table(header_style="bold", border_style="dim")
    table.add_column("trial", justify="right")
    table.add_column(objective, justify="right", no_wrap=True)
    for name in costs:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("epoch", justify="right")
    table.add_column("backbone")
    table.add_column("settings")
    for number, settings, outcome in trials:
        table.add_row(
            str(number),
            value_text(outcome.best_value, floor),
            *(cost_text(outcome.best_metrics.get(name)) for name in costs),
            str(outcome.best_epoch or "-"),
            str(settings.get("backbone", "")),
            settings_line(settings),
        )
    return table


def value_text(value: float | None, floor: float) -> Text:
    """An objective, red where it does not exceed what needs no learning."""
    if value is None:
        return Text("-")
    return Text(percent(value), "red" if value <= floor else "green")


def settings_line(settings: Mapping[str, Any]) -> str:
    """A trial's main settings without its backbone: `mlp 256, bce, adamw, lr 0.001, wd 0.1`."""
    parts: list[str] = []
    for name in SHOWN_SETTINGS:
        text = setting_text(settings.get(name))
        if not text or (name == "unfrozen_stages" and text == "0"):
            continue
        if name == "hidden_sizes" and parts:
            parts[-1] += f" {text}"
        else:
            parts.append(f"{NAMED_SETTINGS[name]} {text}" if name in NAMED_SETTINGS else text)
    return ", ".join(parts)


def setting_text(value: Any) -> str:
    """A setting as a table shows it; a parameter that the trial does not have is empty."""
    if value is None or value == []:
        return ""
    if isinstance(value, (list, tuple)):
        return "-".join(str(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cost_text(value: float | None) -> str:
    """A cost as a table shows it; `-` where it is not known. Its name holds the unit."""
    return "-" if value is None else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
