"""Repetitions: candidates trained again under new seeds, each kept as soon as it is there.

The study's folder holds a repetition's weights and, written last, its record: a kill loses only
what was in work, and a killed fine-tuning goes on from its own checkpoint. Probes that share
features are one job, a fine-tuning is a job of its own; both are trained as their trials were.
`last_epoch` makes a repetition a refit: on the training and validation rows together, to that epoch
of the schedule, as there is nothing left to choose an epoch by.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from core.config import TrialConfig
from core.data.split import IntArray, Split
from core.encoding.shards import content_key, write_json
from core.errors import InputError
from core.report import Metrics, Outcome, Status

from ..goals.constraints import RECALL
from ..trials.channel import ChannelHandle
from ..trials.cohort import save_state, train_cohort
from ..trials.context import Context, FeatureRequest, request_of

if TYPE_CHECKING:
    from ..trials.job_board import BoardHandle

FOLDER = "finalists"
MAILBOX = "finalists"
RECORD = "record.json"
SEED_OFFSET = 500_000_003
"""Between a trial's own seed and those of its repetitions."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial that may win."""

    study: str
    """The study it comes from: this one, or the other part of a two-stage study."""
    number: int
    """There."""
    config: TrialConfig
    value: float
    """Its best validation objective in the search."""
    features: Mapping[str, str]
    """View's name -> folder of its feature matrix."""

    @property
    def label(self) -> str:
        """For people and for tags."""
        return f"{self.study}/{self.number}"


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A candidate, to be trained once more."""

    candidate: Candidate
    config: TrialConfig
    """The candidate's, with another seed."""
    last_epoch: int | None = None
    """None: trained as in the search. A number: a refit, which ends there."""

    @property
    def epochs(self) -> int:
        return self.last_epoch or self.config.epochs

    @property
    def key(self) -> str:
        """Names its files: the same training has the same key in every session."""
        return f"{self.candidate.study}-{self.candidate.number:06d}-{self.id:x}"

    @property
    def id(self) -> int:
        """What it is to training, as a trial's number is."""
        settings = {
            **self.config.to_dict(),
            "last_epoch": self.last_epoch,
            "trial": self.candidate.label,
        }
        return int(content_key(settings)[:12], 16)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a repetition came to."""

    status: Status
    reason: str
    value: float | None
    """Its best validation objective; of a refit, one on rows that it was trained on."""
    best_epoch: int | None
    seconds: float
    worst_class_recall: float | None = None
    """As `core.metrics.worst_class_recall`, on validation."""


Payload = Any
Work = Callable[[Context, Payload, ChannelHandle], Any]


class Runner(Protocol):
    """Runs jobs at once or one after another: on Ray's workers, or in this process."""

    def __call__(
        self, work: Work, payloads: Sequence[Payload], totals: Mapping[str, int]
    ) -> list[Any]:
        """What `work` gives for each payload, in their order.

        The jobs deliver (payload's place, step's name, done) through the channel; `totals` says
        how much of each step there is in all. An InputError that `work` gives back is raised.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """Repetitions that are trained in one go: probes of the same features, or one fine-tuning."""

    place: int
    """Among the jobs of a call: whose progress it is."""
    step: str
    """What people read beside the bar."""
    repeats: tuple[Repeat, ...]

    @property
    def epochs(self) -> int:
        return max(repeat.epochs for repeat in self.repeats)

    @property
    def finetunes(self) -> bool:
        return self.repeats[0].config.mode == "finetune"


def repeats_of(candidate: Candidate, num_seeds: int) -> list[Repeat]:
    """A candidate under `num_seeds` new seeds, always the same ones."""
    return [
        Repeat(
            candidate=candidate,
            config=dataclasses.replace(
                candidate.config, seed=candidate.config.seed + SEED_OFFSET * (1 + repeat)
            ),
        )
        for repeat in range(num_seeds)
    ]


def context_of(context: Context, repeat: Repeat) -> Context:
    """The study as this repetition sees it: where its weights go, and its rows."""
    split = context.split
    if repeat.last_epoch is not None:
        # Validation rows stay named, as training wants some to look at; nothing is chosen by them.
        split = dataclasses.replace(split, train=rows_of_refit(split), folds=())
    # Without rungs: nobody is asked whether to stop.
    return dataclasses.replace(context, split=split, outputs=context.folder / FOLDER, rungs=())


def rows_of_refit(split: Split) -> IntArray:
    """All rows but those of the test split."""
    return np.union1d(split.train, split.validation)


def state_path(context: Context, repeat: Repeat) -> Path:
    """Where a repetition's weights are: a probe's head, or a whole fine-tuned model."""
    return context_of(context, repeat).state_path(repeat.id)


def kept_path(context: Context, repeat: Repeat, kind: str) -> Path:
    """Where what is kept of a repetition is: its `record.json`, its `validation.safetensors`."""
    return context.folder / FOLDER / f"{repeat.key}.{kind}"


def read_record(context: Context, repeat: Repeat) -> Record | None:
    """What a repetition came to, if it was trained already in this session or an earlier one."""
    path = kept_path(context, repeat, RECORD)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**values, "status": Status(values["status"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"is damaged ({error})", where=str(path), hint="remove it: it is trained again"
        ) from error


def train_missing(
    context: Context, repeats: Sequence[Repeat], run: Runner, *, weights: bool = False
) -> list[Record]:
    """The record of each repetition; those that are not there yet are trained.

    `weights`: those whose weights were cleared away are trained again, too.
    Raises InputError for what cannot be trained at all.
    """
    missing = [repeat for repeat in repeats if not _is_there(context, repeat, weights)]
    jobs = _jobs(missing)
    totals: dict[str, int] = defaultdict(int)
    for job in jobs:
        totals[job.step] += job.epochs
    if jobs:
        run(train_job, jobs, totals)
    records = [read_record(context, repeat) for repeat in repeats]
    assert None not in records
    return [record for record in records if record is not None]


def train_job(context: Context, job: Job, channel: ChannelHandle) -> InputError | None:
    """Train the repetitions of a job in this process and keep what comes out."""
    first = job.repeats[0]

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        channel.deliver(MAILBOX, (job.place, job.step, epoch))
        return ()

    try:
        outcomes = train_cohort(
            context_of(context, first),
            [repeat.config for repeat in job.repeats],
            numbers=[repeat.id for repeat in job.repeats],
            features=[repeat.candidate.features for repeat in job.repeats],
            report=report,
            keep_state=True,
            last_epoch=first.last_epoch,
        )
    except InputError as error:
        return error  # Raised, Ray would wrap it in a traceback.
    for repeat, outcome in zip(job.repeats, outcomes, strict=True):
        _keep(context, repeat, outcome)
    channel.deliver(MAILBOX, (job.place, job.step, job.epochs))  # It may have diverged before.
    return None


def follow_job(
    context: Context, job: Job, channel: ChannelHandle, board: BoardHandle
) -> InputError | None:
    """`train_job` where a worker group trains: hands the one repetition to the board's groups,
    which have `context_of` it, passes their progress on, and keeps what comes out."""
    (repeat,) = job.repeats
    board.submit(
        {
            "cohort": repeat.key,
            "numbers": [repeat.id],
            "trials": [repeat.config.to_dict()],
            "features": [dict(repeat.candidate.features)],
            "last_epoch": repeat.last_epoch,
        }
    )
    for event in board.events(repeat.key):
        if isinstance(event, InputError):
            return event
        if isinstance(event, Outcome):
            _keep(context, repeat, event)
        else:
            channel.deliver(MAILBOX, (job.place, job.step, event.epoch))
    channel.deliver(MAILBOX, (job.place, job.step, job.epochs))
    return None


def clear_weights(context: Context, keep: Collection[Repeat]) -> None:
    """Remove the weights of all repetitions but these: a fine-tuned one's are a whole backbone.
    Their records stay."""
    kept = {state_path(context, repeat) for repeat in keep}
    for path in (context.folder / FOLDER / "states").iterdir():
        if path not in kept:
            path.unlink()


def _is_there(context: Context, repeat: Repeat, weights: bool) -> bool:
    record = read_record(context, repeat)
    # One that failed is tried again by the next session: its worker may have been at fault.
    if record is None or record.value is None:
        return False
    return not weights or state_path(context, repeat).exists()


def _jobs(repeats: Sequence[Repeat]) -> list[Job]:
    """Fine-tunings first, the longest of them first: they decide when all is done."""
    probes: dict[tuple[FeatureRequest, int | None], list[Repeat]] = defaultdict(list)
    finetunes = []
    for repeat in repeats:
        if repeat.config.mode == "finetune":
            finetunes.append(repeat)
        else:
            probes[request_of(repeat.config), repeat.last_epoch].append(repeat)
    finetunes.sort(key=lambda repeat: -repeat.epochs)
    groups = [[repeat] for repeat in finetunes] + list(probes.values())
    return [
        Job(place=place, step=_step(group[0]), repeats=tuple(group))
        for place, group in enumerate(groups)
    ]


def _step(repeat: Repeat) -> str:
    """Epochs of fine-tuning take minutes, those of probes moments: one estimate for each."""
    kind = "fine-tuned" if repeat.config.mode == "finetune" else "probes"
    if repeat.last_epoch is not None:
        return f"refit on train and validation, {kind}: epoch"
    return f"finalists again, {kind}: epoch"


def _keep(context: Context, repeat: Repeat, outcome: Outcome) -> None:
    own = context_of(context, repeat)
    if outcome.state is not None:  # A fine-tuning has saved its own.
        save_state(own.state_path(repeat.id), outcome.state)
    record = Record(
        status=outcome.status,
        reason=outcome.reason,
        value=outcome.best_value if outcome.status is Status.COMPLETE else None,
        best_epoch=outcome.best_epoch,
        seconds=outcome.seconds,
        worst_class_recall=outcome.best_metrics.get(RECALL),
    )
    path = kept_path(context, repeat, RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(record))
    shutil.rmtree(own.checkpoint_folder(repeat.id), ignore_errors=True)
