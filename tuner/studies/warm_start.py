"""First points of a new study from the best trials of earlier ones: `--from-study`.

Only their settings are taken, never their values. Where space, table and split are those of the
earlier study, `tuner resume` continues it and its sampler knows every result; anywhere else a value
was measured on other pictures, and as a trial here it could win by them. So the points are trained
again: every value in a study is its own. Trials that do not fit the new space are counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.data.split import IntArray, Split
from core.data.table import Table
from core.encoding.shards import write_json
from core.errors import InputError

from ..home import Home
from ..spaces.space import SearchSpace
from .parts import studies_of
from .study import Study, open_study
from .warm_points import WarmPoint, complete_trials, in_turns, mode_of, warm_point

if TYPE_CHECKING:
    from rich.console import Console

FLAG = "--from-study"
FILE = "warm_start.json"
"""In a study's folder: which trials its first points come from."""
NUM_TRIALS = 10
"""Points taken unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What `--from-study` came to."""

    space: SearchSpace
    """The new space, with the points before its own."""
    points: tuple[WarmPoint, ...]
    num_complete: int
    """Complete trials that the earlier studies have."""
    misfits: dict[str, int]
    """Setting -> complete trials that do not fit because of it; one trial may count for several."""
    num_misfits: int
    """Complete trials that do not fit."""
    sources: tuple[Study, ...]

    def announce(self, folder: Path, table: Table, split: Split, console: Console) -> None:
        """Keep the points in the study's folder, and say where they come from."""
        write_json(folder / FILE, [dataclasses.asdict(point) for point in self.points])
        for line in self.lines(table, split):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def lines(self, table: Table, split: Split) -> list[str]:
        """What a person is told of it when the study is to run on this table and split."""
        earlier = continues(self.sources, self.space, table, split)
        return [warm_start_text(self), *([continues_text(earlier)] if earlier else [])]


def warm_start_of(
    home: Home, space: SearchSpace, names: Sequence[str], num_trials: int
) -> WarmStart | None:
    """`--from-study` and `--from-trials` together; None if no study is named. Raises InputError for
    a study that is not there, or if no trial fits."""
    return warm_start(space, read_sources(home, names), num_trials) if names else None


def read_sources(home: Home, names: Sequence[str]) -> list[Study]:
    """The earlier studies, a fine-tuning part behind its probes. A name is one of `home`'s studies,
    or the folder of a study anywhere. Raises InputError for one that is not there."""
    found: dict[Path, Study] = {}
    for name in names:
        folder = Path(name).expanduser()
        try:
            if folder.name != name or (folder / "study.json").is_file():
                # A folder, even one in the working directory: its home is two levels up.
                owner = Home(root=folder.resolve().parents[1])
                study = _study_in(folder.resolve())
            else:
                owner, study = home, open_study(home, name)
        except InputError as error:
            raise InputError(
                f"no study can be read there: {error}",
                where=f"{FLAG} {name}",
                hint="the name of a study (a folder in studies/), or the path of its folder",
            ) from error
        for part in studies_of(owner, study):
            found.setdefault(part.folder.resolve(), part)
    return list(found.values())


def warm_start(space: SearchSpace, sources: Sequence[Study], num_trials: int) -> WarmStart:
    """The best trials of earlier studies as first points of each part of `space`.

    Values of two studies cannot be compared, so the studies take turns: the best of each, then the
    second best. No two points of a part are the same. Raises InputError if no trial fits.
    """
    if num_trials < 1:
        raise InputError(f"at least one is needed, but got {num_trials}", where="--from-trials")
    records = [(study, complete_trials(study)) for study in sources]
    points: list[WarmPoint] = []
    misfits: Counter[str] = Counter()
    num_misfits = 0
    for part in space.parts:
        queues = []
        for study, trials in records:
            fitting = []
            for trial in trials:
                if mode_of(trial) != part.mode:
                    continue
                made = warm_point(study.record.name, trial, part)
                if isinstance(made, WarmPoint):
                    fitting.append(made)
                else:
                    misfits.update(made)
                    num_misfits += 1
            queues.append(fitting)
        points += in_turns(queues, num_trials)
    modes = {part.mode for part in space.parts}
    other = sum(mode_of(trial) not in modes for _, trials in records for trial in trials)
    if other:
        misfits["mode"] += other
    made_of = WarmStart(
        space=_with_points(space, points),
        points=tuple(points),
        num_complete=sum(len(trials) for _, trials in records),
        misfits=dict(misfits.most_common()),
        num_misfits=num_misfits + other,
        sources=tuple(sources),
    )
    if not points:
        names = ", ".join(study.record.name for study in sources)
        raise InputError(
            f"no trial of {names} can start this space: {_misfit_text(made_of)}",
            where=FLAG,
            hint=f"leave {FLAG} out, or widen the ranges that are named",
        )
    return made_of


def warm_start_text(warm: WarmStart) -> str:
    """For people: what starts from where, what was changed, and what does not fit."""
    by_study: dict[str, list[int]] = {}
    for point in warm.points:
        by_study.setdefault(point.study, []).append(point.number)
    starts = "; ".join(
        f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of {study}"
        for study, numbers in by_study.items()
    )
    text = f"first points: the settings of {starts}"
    changed = Counter(name for point in warm.points for name in point.changed)
    if changed:
        text += f" ({_times(changed)} as this space has it)"
    return f"{text}; {_misfit_text(warm)}"


def continues(warm_from: Sequence[Study], space: SearchSpace, table: Table, split: Split) -> str:
    """The first of the earlier studies that searched this very space on this table and split, so
    that resuming it would keep its results; empty if none did."""
    for study in warm_from:
        if study.record.after is not None or study.record.fingerprint != table.fingerprint():
            continue
        if study.space().fingerprint() == space.fingerprint():
            parts, theirs = _rows(split), _rows(Split.load(study.split_path, table))
            if len(parts) == len(theirs) and all(map(np.array_equal, parts, theirs)):
                return study.record.name
    return ""


def continues_text(name: str) -> str:
    """The hint that goes with `continues`."""
    return (
        f"{name} searched the same space on the same table and split: tuner resume {name} "
        "--trials MORE would go on with all of its results, and train nothing twice"
    )


def _study_in(folder: Path) -> Study:
    """The study in a folder of any home."""
    if not (folder / "study.json").is_file():
        raise InputError("there is no study.json", where=str(folder))
    return open_study(Home(root=folder.parents[1]), folder.name)


def _rows(split: Split) -> list[IntArray]:
    return [split.train, split.validation, split.test, *split.folds]


def _with_points(space: SearchSpace, points: Sequence[WarmPoint]) -> SearchSpace:
    finetune = space.finetune
    if finetune is not None:
        finetune = _with_points(finetune, points)
    mine = tuple(point.point for point in points if point.mode == space.mode)
    return dataclasses.replace(space, points=(*mine, *space.points), finetune=finetune)


def _times(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {times}x" for name, times in counts.most_common())


def _misfit_text(warm: WarmStart) -> str:
    if not warm.num_complete:
        return "there is no complete trial"
    if not warm.num_misfits:
        return f"all {warm.num_complete} complete trials fit"
    names = _times(Counter(warm.misfits))
    return f"{warm.num_misfits} of {warm.num_complete} complete trials do not fit ({names})"
