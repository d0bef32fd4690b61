"""The two studies of a two-part space: NAME searches probes, NAME-finetune goes on from the best.

Each is a study like any other, with numbers, runs and a resume of its own; the second's record
names the first. The second begins when the first is over: its first points are the best probes.
"""

from __future__ import annotations

import dataclasses
import shutil

from core.encoding.shards import write_json
from core.errors import InputError

from ..home import Home
from ..spaces.space import SearchSpace
from .credentials import copy_credentials
from .plan import Plan, make_plan
from .seeds import Seed
from .study import Study, finetune_name, open_study

SEEDS_FILE = "seeds.json"


def make_plans(
    space: SearchSpace,
    *,
    trials: int | None = None,
    finetune_trials: int | None = None,
    hours: float | None = None,
    device_hours: float | None = None,
) -> tuple[Plan, Plan | None]:
    """The plan of a space, and that of its fine-tuning part. Of the hours, and of the device-hours,
    the probes have at most the first half. Raises InputError for a budget that is not positive, or
    of a part that is not there."""
    check_finetune_trials(finetune_trials, space)
    if space.finetune is None:
        return make_plan(space, trials=trials, hours=hours, device_hours=device_hours), None
    finetune = make_plan(
        space.finetune, trials=finetune_trials, hours=hours, device_hours=device_hours
    )
    first = [None if time is None else time / 2 for time in (hours, device_hours)]
    return make_plan(space, trials=trials, hours=first[0], device_hours=first[1]), finetune


def check_finetune_trials(finetune_trials: int | None, space: SearchSpace) -> None:
    """What is wrong with `--finetune-trials` alone."""
    where = "--finetune-trials"
    if finetune_trials is None:
        return
    if space.finetune is None:
        raise InputError(
            f"the space {space.name} has no fine-tuning part after a probe part",
            where=where,
            hint="its number of trials is --trials",
        )
    if finetune_trials < 1:
        raise InputError(f"at least one trial is needed, but got {finetune_trials}", where=where)


def finetune_study(home: Home, study: Study) -> Study | None:
    """The fine-tuning part of a two-part study; None if there is none, or not yet."""
    name = finetune_name(study.record.name)
    if not (home.studies / name / "study.json").is_file():
        return None
    found = open_study(home, name)
    if found.record.after != study.record.name:
        return None
    found.share_storage(study)
    return found


def studies_of(home: Home, study: Study) -> list[Study]:
    """A study, and its fine-tuning part where that has begun."""
    finetune = finetune_study(home, study)
    return [study] if finetune is None else [study, finetune]


def begin_finetune_study(home: Home, study: Study, seeds: list[Seed]) -> Study:
    """The fine-tuning part of a two-part study, with the best probes as its first points.

    The record is written last: a kill in the middle leaves a folder that the next call completes.
    Raises InputError if another study took the name meanwhile.
    """
    space = study.space().finetune
    assert space is not None
    points = (*(seed.point for seed in seeds), *space.points)
    record = dataclasses.replace(
        study.record,
        name=finetune_name(study.record.name),
        space=dataclasses.replace(space, points=points).to_dict(),
        trials=study.record.finetune_trials or space.trials,
        finetune_trials=None,
        after=study.record.name,
    )
    begun = Study(home.studies / record.name, record)
    if (begun.folder / "study.json").exists():
        raise InputError(
            f"a study named {record.name!r} exists, which does not go on from {record.after}",
            where=str(begun.folder),
            hint="move it elsewhere, then tuner resume",
        )
    begun.folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(study.split_path, begun.split_path)
    copy_credentials(study.folder, begun.folder)
    begun.share_storage(study)
    write_json(begun.folder / SEEDS_FILE, [dataclasses.asdict(seed) for seed in seeds])
    write_json(begun.folder / "study.json", dataclasses.asdict(record))
    return begun


def first_part(study: Study) -> Study:
    """The study itself. Raises InputError for a fine-tuning part: the first part resumes both."""
    if study.record.after is not None:
        raise InputError(
            f"it is the second part of {study.record.after}",
            where=f"study {study.record.name}",
            hint=f"go on with both: tuner resume {study.record.after}",
        )
    return study
