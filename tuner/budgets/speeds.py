"""Which speeds a quote is made of: their names in `calibration.json`, and what a study teaches.

A head's speed is `Outcome.seconds` an epoch and 1,000 training rows: of a stack's time its share,
on one thread where a CPU trains one stack a thread. What a cohort takes beyond that (starting,
waiting at rungs, an uneven share of threads) is learned as a line, and so is what an extraction
takes beyond its backbones' passes. Names hold the device, as a home may be used from several.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import TrialConfig
from core.errors import InputError
from core.head_settings import structure
from core.report import Status

from ..finalists.repeats import FOLDER, RECORD
from ..sampling.pruners import PrunerSpec
from ..trials.context import FeatureRequest, request_of
from .calibration import Note, learn
from .device_time import FINALISTS, DeviceMeter

if TYPE_CHECKING:
    from rich.console import Console

    from core.data.split import Split

    from ..features.extraction import ExtractionProgress
    from ..home import Home
    from ..studies.outcomes import EndedTrial
    from ..trials.cluster import Workers

SESSION = "session"
"""Seconds of a search in which no device was busy for it."""
LEAST_PICTURES = 16
"""Fewer pictures through a backbone say nothing of its speed."""
MANY_PICTURES = 1000
"""Fewer take longer each, as starting weighs more: their speed has a name of its own."""


def device_name(workers: Workers) -> str:
    """What one trial, or one extraction worker, computes on."""
    each = f"{workers.gpus:g} gpu" if workers.gpus else f"{int(workers.cpus)} cores"
    return f"{workers.per_trial}x{each}" if workers.per_trial > 1 else each


def threads_of(workers: Workers) -> int:
    """Stacks of heads that a worker trains at once."""
    return 1 if workers.gpus else workers.num_threads


def feature_key(
    device: str, precision: str, label: str, *, decodes: bool, num_pictures: int
) -> str:
    """Seconds a picture of one worker; `decodes`: from the picture files."""
    many = "many" if num_pictures >= MANY_PICTURES else "few"
    return f"features/{device}/{precision}/{label}/{'files' if decodes else 'pixels'}/{many}"


def training_key(device: str, precision: str, config: TrialConfig) -> str:
    """Seconds an epoch and 1,000 training rows of one trial."""
    request = request_of(config)
    if config.mode == "finetune":
        stages = f"stages {config.unfrozen_stages}"
        return f"finetune/{device}/{precision}/{request.label}/{stages}"
    head = " ".join(str(part) for part in structure(config))
    return f"{heads_prefix(device, precision, request)}{head}/batch {config.batch_size}"


def heads_prefix(device: str, precision: str, request: FeatureRequest) -> str:
    """What the names of all heads on the same features begin with."""
    return f"head/{device}/{precision}/{request.label}/"


def cohort_key(device: str, mode: str) -> str:
    """Line: training seconds of a cohort -> the seconds it took."""
    return f"cohort/{device}/{mode}"


def first_key(device: str, mode: str) -> str:
    """Seconds that the first cohort of a session takes beyond its training: its worker starts."""
    return f"first cohort/{device}/{mode}"


def extraction_key(device: str) -> str:
    """Line: seconds of the passes of the slowest worker -> those of the extraction."""
    return f"extraction/{device}"


def finalists_key(device: str, mode: str) -> str:
    """Line: training seconds of the finalists' repetitions -> those until the winner is scored."""
    return f"finalists/{device}/{mode}"


def epochs_key(pruner: PrunerSpec) -> str:
    """Epochs that trials were trained for, over those they asked for."""
    return f"epochs/{pruner.name} {json.dumps(pruner.options, sort_keys=True)}"


def rows_an_epoch(split: Split) -> int:
    """Training rows that one trial sees in an epoch, those of all folds."""
    return sum(len(train) for train, _ in split.pairs())


def keep_notes(home: Home, console: Console, notes: Sequence[Note]) -> None:
    """Add what was learned to the home's calibration. That fails no study, but it is said."""
    try:
        learn(home.root, notes)
    except (OSError, InputError) as error:
        console.print(
            f"what this study showed of this machine's speed is not kept: {error}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


class FeatureClock:
    """Hears the workers of an extraction and keeps how fast each pass went."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, str], ExtractionProgress] = {}

    def __call__(self, news: ExtractionProgress) -> None:
        self._last[news.worker, news.label] = news

    def notes(self, device: str, precision: str, seconds: float) -> list[Note]:
        """What was learned. `seconds`: that the extraction took in all."""
        notes: list[Note] = []
        passes: dict[int, float] = {}
        for (worker, label), news in self._last.items():
            passes[worker] = passes.get(worker, 0.0) + news.seconds
            if news.done >= LEAST_PICTURES and news.done == news.total:
                key = feature_key(
                    device, precision, label, decodes=news.decodes, num_pictures=news.total
                )
                notes.append((key, news.seconds / news.done))
        notes.append((extraction_key(device), (max(passes.values(), default=0.0), seconds)))
        return notes


def notes_of_trials(
    cohorts: Iterable[tuple[Iterable[int], float]],
    ended: Mapping[int, EndedTrial],
    *,
    workers: Workers,
    precision: str,
    rows: int,
    mode: str,
    pruner: PrunerSpec,
) -> list[Note]:
    """What the trials of a session teach.

    Args:
        cohorts: trials and seconds of each.
        ended: every trial's end.
        workers: one trial's.
        rows: of the training in an epoch.
    """
    device, threads = device_name(workers), threads_of(workers)
    notes: list[Note] = []
    by_key: dict[str, list[float]] = {}
    trained = asked = 0
    for place, (numbers, seconds) in enumerate(cohorts):
        members = [ended[number] for number in numbers if number in ended]
        training = sum(member.outcome.seconds for member in members)
        if training:
            divided = threads if mode == "probe" and len(members) > 1 else 1
            if place:
                notes.append((cohort_key(device, mode), (training / divided, seconds)))
            else:
                rest = max(0.1, seconds - training / divided)
                notes.append((first_key(device, mode), rest))
        for member in members:
            epochs = len(member.outcome.curve)
            if not epochs or member.outcome.status not in (Status.COMPLETE, Status.PRUNED):
                continue
            config = TrialConfig.from_dict(dict(member.settings))
            each = member.outcome.seconds / epochs / rows * 1000
            by_key.setdefault(training_key(device, precision, config), []).append(each)
            trained, asked = trained + epochs, asked + config.epochs
    # One number a thing and study: a long study must not push out what earlier ones found.
    notes += [(key, sum(values) / len(values)) for key, values in by_key.items()]
    if asked:
        notes.append((epochs_key(pruner), trained / asked))
    return notes


def notes_of_finalists(
    folder: Path, since: float, meter: DeviceMeter, *, workers: Workers, mode: str
) -> list[Note]:
    """What the finalists of a session teach, which began at `time.time()` `since`."""
    held = meter.sums().get(FINALISTS, 0.0) / meter.devices
    training = repetition_seconds(folder, since) / (threads_of(workers) if mode == "probe" else 1)
    if not held or not training:
        return []
    return [(finalists_key(device_name(workers), mode), (training, held))]


def repetition_seconds(folder: Path, since: float) -> float:
    """Training seconds of the repetitions in a study's folder that were kept since `time.time()`
    was `since`."""
    found = [
        path for path in (folder / FOLDER).glob(f"*.{RECORD}") if path.stat().st_mtime >= since
    ]
    return sum(float(json.loads(path.read_text())["seconds"]) for path in found)
