"""Long steps with progress and the time left: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ..features.extraction import ExtractionProgress

LINE_SECONDS = 10.0
"""Between lines of a step where there is no terminal."""


class Steps:
    """Shows any number of steps by name. Made by `showing_steps`."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._last_line: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        """`done` of `total` things of this step are done."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
            self._started[name] = self._last_line[name] = time.monotonic()
        self._progress.update(self._tasks[name], completed=done, total=total)
        if not self._console.is_terminal:
            self._print_line(name, done, total)

    def _print_line(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last_line[name] < LINE_SECONDS:
            return
        self._last_line[name] = now
        elapsed = now - self._started[name]
        left = (
            f", about {duration(elapsed / done * (total - done))} left" if 0 < done < total else ""
        )
        self._console.print(f"{name}: {done:,}/{total:,}{left}", highlight=False)


@contextmanager
def showing_steps(console: Console) -> Iterator[Steps]:
    """A place for steps to show themselves while the block runs; bars stay on the screen."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield Steps(console, progress)


class ExtractionView:
    """Hears the workers of an extraction and shows a step a backbone, workers added up."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._parts: dict[str, dict[int, tuple[int, int]]] = {}

    def __call__(self, news: ExtractionProgress) -> None:
        parts = self._parts.setdefault(news.label, {})
        parts[news.worker] = (news.done, news.total)
        done, total = (sum(column) for column in zip(*parts.values(), strict=True))
        self._steps(f"features of {news.label}", done, total)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
