"""The end of a study for people: finalists side by side, and what was made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from ..views.live import percent

if TYPE_CHECKING:
    from .crown import Winner

SHOWN_ROUNDING = 0.05
"""From this difference of a probability on, a person is told."""


def finalist_table(winner: Winner) -> Table:
    """A row a finalist, best mean first."""
    table = Table(title="finalists", title_justify="left", header_style="bold", border_style="dim")
    for name in ("trial", "mean", "spread", "seeds", "in search"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("backbone", "mode"):
        table.add_column(name)
    any_out = any(finalist.out for finalist in winner.finalists)
    if any_out:
        table.add_column("cannot win, as")
    for finalist in winner.finalists:
        seeds = str(len(finalist.values))
        if finalist.failed:
            seeds += f" ({finalist.failed} failed)"
        table.add_row(
            _short(winner, finalist.label),
            percent(finalist.mean),
            f"{100 * finalist.spread:.1f} points" if len(finalist.values) > 1 else "-",
            seeds,
            percent(finalist.value),
            finalist.backbone,
            finalist.mode,
            *([finalist.out] if any_out else []),
        )
    return table


def model_lines(winner: Winner) -> list[tuple[str, str]]:
    """(name, text) of the winner's panel: its validation scores, and what was made of it."""
    first = winner.finalists[0]
    seeds = "1 new seed" if len(first.values) == 1 else f"{len(first.values)} new seeds"
    lines = [
        (
            "validation",
            f"{percent(first.value)} in the search, {percent(first.mean)} over {seeds} (optimism "
            f"{100 * winner.optimism:+.1f} points, best of {len(winner.finalists)} finalists)",
        )
    ]
    if winner.ensemble is not None:
        lines.append(("ensemble", _ensemble_text(winner)))
    if winner.refit is not None:
        epochs = ", ".join(
            f"{n} epochs of trial {_short(winner, label)}"
            for label, n in winner.refit.epochs.items()
        )
        lines.append(
            (
                "refit",
                f"on {winner.refit.num_images:,} training and validation pictures, {epochs}; "
                "thresholds and calibration are from the validation scores before it",
            )
        )
    if winner.rounding > SHOWN_ROUNDING:
        lines.append(
            (
                "precision",
                f"[yellow]served in float32, a probability differs by up to {winner.rounding:.2f} "
                "from what was scored: rounding changes what this backbone sees[/]",
            )
        )
    return lines


def _ensemble_text(winner: Winner) -> str:
    ensemble = winner.ensemble
    assert ensemble is not None
    if ensemble.estimate is None:
        return "none: every finalist failed under some seed"
    numbers = (
        f"re-seeded validation {percent(ensemble.estimate)} against {percent(ensemble.single)} of "
        "the best finalist alone"
    )
    if not ensemble.registered:
        return f"not taken: {numbers}"
    shares = ", ".join(
        f"{percent(weight)} of trial {_short(winner, label)}"
        for label, weight in ensemble.weights.items()
    )
    return f"{shares}: {numbers}"


def _short(winner: Winner, label: str) -> str:
    """A trial as people need it: its number alone where all finalists are of one study."""
    several = len({finalist.study for finalist in winner.finalists}) > 1
    return label if several else label.rpartition("/")[2]
