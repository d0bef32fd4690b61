"""A study on disk: what was asked for, where its state lives, and how its trials ended.

`study.json` holds what cannot change (space, data, seed, addresses); trials live in Optuna's
storage, which is the one truth that everything else is repaired from. A trial's end is told to
Optuna with an `outcome` attribute, so that `tuner trials` needs no tracking server.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.encoding.shards import write_json
from core.errors import InputError
from core.report import Outcome, Status

from ..home import Home
from ..spaces.space import SearchSpace
from .credentials import full_address, keep_credentials, without_credentials
from .outage import OutageWatcher
from .storage import open_storage, watch_outages

if TYPE_CHECKING:
    import optuna

FORMAT = 1
OUTCOME = "outcome"
"""Optuna user attribute: how the trial ended, as JSON."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What a study is, as `study.json` keeps it."""

    name: str
    space: dict[str, Any]
    """As `SearchSpace.to_dict`."""
    data: dict[str, Any]
    """The arguments of `core.data.table.read_table`, paths absolute."""
    skipped: tuple[str, ...]
    """Files of damaged pictures that were left out."""
    fingerprint: str
    """Of the table."""
    num_folds: int | None
    seed: int
    trials: int
    """Budget it began with."""
    storage: str | None
    """Optuna's storage URL, without password; None for the journal in the study's folder."""
    tracking_uri: str
    """MLflow's address, without password. `Study` knows both in full."""
    model: str
    """Name under which the winner is registered."""
    weights: str
    weights_dir: str | None
    artifacts: str | None = None
    """URL under which MLflow is to keep files; None for the home's folder, or a server's own."""
    finetune_trials: int | None = None
    """Budget of the fine-tuning part; None for a study of one part."""
    device_hours: float | None = None
    """Budget of device time of all parts; None for no limit."""
    after: str | None = None
    """Of a fine-tuning part: the study of the probes that it starts from."""
    finalists: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How it ends: arguments of `tuner.finalists.crown.FinalistOptions`; those that lack are as
    usual."""
    weight_fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    """By label of a backbone: what its weights are; see `tuner.backbones`. Empty in a study of an
    earlier version."""
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as Optuna remembers it."""

    number: int
    status: str
    """`complete`, `pruned`, `failed`, `infeasible`, or `running`."""
    reason: str
    value: float | None
    """Best validation objective; of a pruned trial, the best it reached."""
    best_epoch: int | None
    epochs: int
    """Epochs trained."""
    seconds: float
    settings: dict[str, Any]
    """What the space set, in its order."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further validation metrics at its best epoch, and costs where they count."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Study:
    """A study's folder and its record. Its storage is opened once, when it is first asked for."""

    def __init__(self, folder: Path, record: StudyRecord) -> None:
        self.folder = folder
        self.record = record
        self._storage: optuna.storages.BaseStorage | None = None

    @property
    def split_path(self) -> Path:
        return self.folder / "split.json"

    def storage_url(self) -> str | None:
        """Optuna's storage URL, with its password if one was given; None for the journal."""
        url = self.record.storage
        return None if url is None else full_address(self.folder, "storage", url)

    def tracking_uri(self) -> str:
        """MLflow's address, with its password if one was given."""
        return full_address(self.folder, "tracking_uri", self.record.tracking_uri)

    def storage(self) -> optuna.storages.BaseStorage:
        """Optuna's storage. Raises InputError if it does not answer when it is first opened."""
        if self._storage is None:
            self._storage = open_storage(self.storage_url(), self.folder)
        return self._storage

    def share_storage(self, other: Study) -> None:
        """Use the open database of another study, if it is in the same one: opening it anew would
        fail where it is away for a moment."""
        if self.record.storage is not None and self.record.storage == other.record.storage:
            self._storage = other.storage()

    def watch_storage(self, watcher: OutageWatcher) -> None:
        """Tell `watcher`, and nobody else, that the storage is away."""
        watch_outages(self.storage(), watcher)

    def space(self) -> SearchSpace:
        from ..spaces.file import parse_space

        after_probes = self.record.after is not None
        return parse_space(self.record.space, name=self.record.name, after_probes=after_probes)

    @property
    def directions(self) -> tuple[Literal["maximize", "minimize"], ...]:
        """Of the objectives, for Optuna: the first is maximised, costs are minimised."""
        costs = self.record.space.get("objectives", [])[1:]
        down: Literal["minimize"] = "minimize"
        return ("maximize", *(down for _ in costs))

    def optuna(
        self,
        *,
        sampler: optuna.samplers.BaseSampler | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
        new: bool = False,
    ) -> optuna.Study:
        """The Optuna study, made in its storage if it is not there yet.

        Raises InputError if it is to be `new` and is there.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            return optuna.create_study(
                storage=self.storage(),
                study_name=self.record.name,
                sampler=sampler,
                pruner=pruner,
                directions=self.directions,
                load_if_exists=not new,
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise _used_name(self.record.name) from error

    def never_began(self) -> bool:
        """Whether it has no trial. False, too, where the storage does not answer."""
        try:
            return not self.optuna().get_trials(deepcopy=False)
        except InputError:  # Said already by the call that waited for it.
            return False

    def discard(self) -> None:
        """Remove a study that never began, so that its name is free again."""
        import optuna

        if self.record.storage is not None:
            optuna.delete_study(study_name=self.record.name, storage=self.storage())
        shutil.rmtree(self.folder)


def finetune_name(name: str) -> str:
    """What the study of the fine-tuning part of the two-part study `name` is called."""
    return f"{name}-finetune"


def check_name(name: str) -> None:
    """Raises InputError unless `name` can name a folder, an MLflow run and a database row."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a study",
            where="--study",
            hint="letters, digits, dots, dashes and underscores; a letter or digit first",
        )


def refuse_used_name(home: Home, name: str, elsewhere: Collection[str] = ()) -> None:
    """Raises InputError if there is a study of this name in the home, or `elsewhere`."""
    if (home.studies / name).exists():
        raise InputError(
            f"a study named {name!r} exists",
            where="--study",
            hint=f"go on with it: tuner resume {name}; or choose another name",
        )
    if name in elsewhere:
        raise _used_name(name)


def free_name(
    home: Home, stem: str, elsewhere: Collection[str] = (), *, two_parts: bool = False
) -> str:
    """`stem-1`, or the first number that neither the home nor `elsewhere` holds, for both studies
    of a two-part one."""

    def used(name: str) -> bool:
        return (home.studies / name).exists() or name in elsewhere

    number = 1
    while used(f"{stem}-{number}") or (two_parts and used(finetune_name(f"{stem}-{number}"))):
        number += 1
    return f"{stem}-{number}"


def create_study(home: Home, record: StudyRecord) -> Study:
    """A new study's folder with its record. Raises InputError if the name is in use.

    Passwords in the record's addresses go to a file that only its owner can read.
    """
    check_name(record.name)
    folder = home.studies / record.name
    refuse_used_name(home, record.name)
    folder.mkdir(parents=True)
    addresses = {"storage": record.storage, "tracking_uri": record.tracking_uri}
    keep_credentials(folder, addresses)
    record = dataclasses.replace(
        record,
        storage=None if record.storage is None else without_credentials(record.storage),
        tracking_uri=without_credentials(record.tracking_uri),
    )
    write_json(folder / "study.json", dataclasses.asdict(record))
    return Study(folder, record)


def open_study(home: Home, name: str) -> Study:
    """An existing study. Raises InputError if there is none, or its record is damaged."""
    folder = home.studies / name
    path = folder / "study.json"
    if not path.is_file():
        known = sorted(p.parent.name for p in home.studies.glob("*/study.json"))
        raise InputError(
            f"there is no study {name!r}",
            where=str(home.studies),
            hint=f"there are: {', '.join(known)}" if known else "there is none yet: tuner search",
        )
    try:
        values = json.loads(path.read_text())
        values["skipped"] = tuple(values["skipped"])
        record = StudyRecord(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the study's record is damaged ({error})", where=str(path)) from error
    if record.format != FORMAT:
        raise InputError(f"format {record.format} is not {FORMAT}", where=str(path))
    return Study(folder, record)


def outcome_attribute(outcome: Outcome) -> dict[str, Any]:
    """What Optuna keeps of an outcome, beside the trial's own state and value."""
    return {
        "status": outcome.status.value,
        "reason": outcome.reason,
        "best_value": outcome.best_value,
        "best_epoch": outcome.best_epoch,
        "epochs": len(outcome.curve),
        "seconds": outcome.seconds,
        "metrics": outcome.best_metrics,
    }


def trial_records(study: optuna.Study, space: SearchSpace) -> Iterator[TrialRecord]:
    """All trials of a study, in order of number."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        kept = trial.user_attrs.get(OUTCOME, {})
        status = kept.get("status") or _STATUSES[trial.state.name]
        try:
            settings = space.from_params(trial.params)
        except InputError:  # a trial cut off between ask and suggest has only a part of them
            settings = dict(trial.params)
        yield TrialRecord(
            number=trial.number,
            status=status,
            reason=kept.get("reason", ""),
            value=kept.get("best_value", (trial.values or [None])[0]),
            best_epoch=kept.get("best_epoch"),
            epochs=kept.get("epochs", 0),
            seconds=kept.get("seconds", 0.0),
            settings=settings,
            metrics=kept.get("metrics", {}),
        )


_STATUSES = {
    "COMPLETE": Status.COMPLETE.value,
    "PRUNED": Status.PRUNED.value,
    "FAIL": Status.FAILED.value,
    "RUNNING": "running",
}


def _used_name(name: str) -> InputError:
    return InputError(
        f"a study named {name!r} is in this MLflow or storage already, from another home",
        where="--study",
        hint="choose another name",
    )
