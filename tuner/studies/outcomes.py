"""Every trial's full outcome, appended to a file of the study before anyone else is told.

Optuna keeps a trial's value, MLflow its curve. If the process dies between telling the one and
the other, this is what the other is repaired from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.report import Outcome, Status

from .appending import append_whole

FILE = "outcomes.jsonl"


@dataclass(frozen=True, kw_only=True)
class EndedTrial:
    """A trial with its end."""

    number: int
    settings: Mapping[str, Any]
    outcome: Outcome


class OutcomeLog:
    """The file `outcomes.jsonl` of a study."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def read(self) -> dict[int, EndedTrial]:
        """By trial number; the last line of a number counts. A line cut off by a kill is not
        counted: its trial was not told to anyone."""
        ended: dict[int, EndedTrial] = {}
        if not self._path.exists():
            return ended
        for line in self._path.read_text().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            outcome = values["outcome"]
            outcome["status"] = Status(outcome["status"])
            outcome["curve"] = tuple(outcome["curve"])
            ended[values["number"]] = EndedTrial(
                number=values["number"], settings=values["settings"], outcome=Outcome(**outcome)
            )
        return ended

    def trial_ended(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        """`trials_ended` of one."""
        self.trials_ended([(number, settings, outcome)])

    def trials_ended(self, ends: Sequence[tuple[int, Mapping[str, Any], Outcome]]) -> None:
        """Append a line each and bring them to the disk. Raises InputError where that is full."""
        lines = []
        for number, settings, outcome in ends:
            values = dataclasses.asdict(dataclasses.replace(outcome, state=None))
            lines.append(
                json.dumps({"number": number, "settings": dict(settings), "outcome": values})
            )
        append_whole(self._path, "".join(f"{line}\n" for line in lines).encode())
