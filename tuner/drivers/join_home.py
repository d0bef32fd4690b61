"""A study that is joined, in this home: the one that is here, or rebuilt from its storage."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data.split import Split, make_split
from core.data.table import Table, read_table
from core.errors import InputError

from ..addresses import canonical, without_password
from ..backbones import check_same_weights
from ..data import name_in, reread_table, without_rows
from ..home import Home
from ..preparation import check_with_progress
from ..studies.credentials import without_credentials
from ..studies.parts import finetune_study, first_part
from ..studies.shared_record import check_split, published_record
from ..studies.storage import open_storage, stored_studies
from ..studies.study import Study, StudyRecord, create_study, finetune_name, open_study
from .lock import check_shared

if TYPE_CHECKING:
    import optuna
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class JoinFlags:
    """What is where on this machine; None: as the study's record says."""

    storage: str | None = None
    data: Path | None = None
    weights: str | None = None
    """A folder, or `none`."""
    tracking_uri: str | None = None


def study_here(
    name: str, home: Home, console: Console, flags: JoinFlags
) -> tuple[Study, Table, Split]:
    """The study `name` with its table and split; rebuilt in this home if it is not there yet.

    Raises InputError if it is nowhere, has not begun, or has other data or another split.
    """
    if (home.studies / name / "study.json").is_file():
        study = first_part(open_study(home, name))
        _refuse_other(study, flags)
        record = study.record
        table = reread_table(
            dict(record.data), skipped=record.skipped, fingerprint=record.fingerprint
        )
        _check_weights(record, study, console)
        return study, table, Split.load(study.split_path, table)
    if flags.storage is None:
        raise InputError(
            f"there is no study {name!r} in this home",
            where=str(home.studies),
            hint="name the database that it is in: --storage URL",
        )
    url = canonical(flags.storage)
    where = f"--storage {without_password(url)}"
    check_shared(url)
    known = stored_studies(url)
    if name not in known:
        raise InputError(
            f"there is no study {name!r}",
            where=where,
            hint=f"there are: {', '.join(sorted(known))}" if known else "it holds no study",
        )
    state = _stored(url, name, home)
    published = published_record(state, where=where)
    if published is None:
        raise InputError(
            f"{name} has not begun, or was begun by a version that cannot share it",
            where=where,
            hint=f"try again in a moment; or go on where it began: tuner resume {name}",
        )
    there = first_part(Study(home.studies / name, published))
    record = _as_here(dataclasses.replace(published, storage=url), flags)
    table, split = _table_and_split(record, state, console)
    _check_weights(record, there, console)
    study = create_study(home, record)
    try:
        split.save(study.split_path)
    except BaseException:
        shutil.rmtree(study.folder)
        raise
    return study, table, split


def second_part(home: Home, study: Study) -> Study | None:
    """The fine-tuning part of a study that is joined; None as long as it has not begun."""
    found = finetune_study(home, study)
    if found is not None:
        return found
    url, name = study.storage_url(), finetune_name(study.record.name)
    if url is None or name not in stored_studies(url):
        return None
    record = published_record(_stored(url, name, home), where=f"study {name}")
    if record is None:
        return None
    here = study.record
    record = dataclasses.replace(
        record,
        storage=url,
        tracking_uri=study.tracking_uri(),
        data=here.data,
        weights=here.weights,
        weights_dir=here.weights_dir,
    )
    begun = create_study(home, record)
    shutil.copyfile(study.split_path, begun.split_path)
    begun.share_storage(study)
    return begun


def _stored(url: str, name: str, home: Home) -> optuna.Study:
    import optuna

    storage = open_storage(url, home.studies / name)
    return optuna.load_study(study_name=name, storage=storage)


def _check_weights(record: StudyRecord, study: Study, console: Console) -> None:
    """Raises InputError if a backbone's weights here are not those that the study began with.

    `record`: with the weights as they are here. `study`: for its space.
    """
    if not record.weight_fingerprints:
        console.print(
            "this study began with a version that noted no weights: they are not compared",
            style="yellow", highlight=False,
        )  # fmt: skip
        return
    with console.status("comparing the weights of the backbones"):
        check_same_weights(
            study.space(),
            record.weight_fingerprints,
            weights=record.weights,
            weights_dir=Path(record.weights_dir) if record.weights_dir else None,
        )


def _table_and_split(
    record: StudyRecord, state: optuna.Study, console: Console
) -> tuple[Table, Split]:
    """Both as the first driver had them. Raises InputError if they come out otherwise."""
    whole = read_table(**record.data, allow_missing=True)
    names = set(record.skipped)
    table = without_rows(
        whole, {row for row, path in enumerate(whole.paths) if name_in(whole, path) in names}
    )
    where = str(table.root)
    if table.fingerprint() != record.fingerprint:
        raise InputError(
            "these are not the data that the study began with: pictures, labels or ids differ",
            where=where,
            hint="copy them from there; if they lie elsewhere here: --data DIR",
        )
    checked = check_with_progress(table, skip_bad=False, console=console)
    split = make_split(
        checked.table, seed=record.seed, num_folds=record.num_folds, groups=checked.groups
    )
    check_split(state, split, where=where)
    return checked.table, split


def _as_here(record: StudyRecord, flags: JoinFlags) -> StudyRecord:
    """The record with what this machine has elsewhere."""
    changes: dict[str, Any] = {}
    if flags.data is not None:
        changes["data"] = _moved(record.data, flags.data)
    if flags.weights is not None:
        none = flags.weights == "none"
        changes["weights"] = "none" if none else "auto"
        changes["weights_dir"] = None if none else str(_folder(flags.weights))
    if flags.tracking_uri is not None:
        changes["tracking_uri"] = canonical(flags.tracking_uri)
    return dataclasses.replace(record, **changes)


def _folder(weights: str) -> Path:
    folder = Path(weights).expanduser().resolve()
    if not folder.is_dir():
        raise InputError("there is no such folder", where=f"--weights {weights}")
    return folder


def _moved(arguments: dict[str, Any], data: Path) -> dict[str, Any]:
    """Where a table is whose folder lies at `data` here: files inside it have moved along."""
    moved: dict[str, Any] = {**arguments, "data": str(data)}
    for name in ("csv", "images"):
        path = Path(arguments.get(name) or "")
        if path.is_absolute() and path.is_relative_to(arguments["data"]):
            moved[name] = str(path.relative_to(arguments["data"]))
    return moved


def _refuse_other(study: Study, flags: JoinFlags) -> None:
    """Raises InputError where flags name other places than the study in this home has."""
    record = study.record
    wanted = _as_here(record, flags)
    storage = record.storage if flags.storage is None else canonical(flags.storage)
    pairs = {
        "--storage": (_bare(record.storage), _bare(storage)),
        "--data": (record.data["data"], wanted.data["data"]),
        "--weights": (
            (record.weights, record.weights_dir),
            (wanted.weights, wanted.weights_dir),
        ),
        "--tracking-uri": (_bare(record.tracking_uri), _bare(wanted.tracking_uri)),
    }
    for flag, (here, asked) in pairs.items():
        if here != asked:
            raise InputError(
                f"the study in this home has another: {here}",
                where=f"{flag} {asked}",
                hint="leave the flag out, or join from another home (TUNER_HOME)",
            )


def _bare(url: str | None) -> str | None:
    return None if url is None else without_credentials(url)
