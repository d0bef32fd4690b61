"""A study's record in Optuna's storage: from it another home runs the same study.

Kept as attributes of the Optuna study, without passwords. What the record cannot hold, a digest
does: the split must come out the same elsewhere, or trials would be compared that saw different
pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from core.data.split import Split
from core.errors import InputError

from .study import FORMAT, Study, StudyRecord

if TYPE_CHECKING:
    import optuna

RECORD = "record"
"""Optuna study attribute: the study's record."""
SPLIT = "split"
"""Optuna study attribute: digest of its split."""


def publish_study(study: Study, split: Split) -> None:
    """Keep a study's record and the digest of its split beside its trials."""
    state = study.optuna()
    wanted = {RECORD: _plain(dataclasses.asdict(study.record)), SPLIT: split_digest(split)}
    known = state.user_attrs
    for name, value in wanted.items():
        if known.get(name) != value:
            state.set_user_attr(name, value)


def published_record(state: optuna.Study, *, where: str) -> StudyRecord | None:
    """The record that a first driver published; None if none did yet.

    Raises InputError for a record of another version, with `where` as its place.
    """
    values = state.user_attrs.get(RECORD)
    if values is None:
        return None
    if values.get("format") != FORMAT:
        raise InputError(
            f"format {values.get('format')} is not {FORMAT}",
            where=where,
            hint="all drivers of a study need the same version of this program",
        )
    known = {field.name for field in dataclasses.fields(StudyRecord)}
    if not values.keys() <= known:
        raise InputError(
            f"its record has entries that are unknown here: {sorted(values.keys() - known)}",
            where=where,
            hint="all drivers of a study need the same version of this program",
        )
    return StudyRecord(**{**values, "skipped": tuple(values["skipped"])})


def check_split(state: optuna.Study, split: Split, *, where: str) -> None:
    """Raises InputError, with `where` as its place, if the study's split is another."""
    if state.user_attrs.get(SPLIT) != split_digest(split):
        raise InputError(
            "the pictures are split in another way here than where the study began",
            where=where,
            hint="all drivers of a study need the same data and the same version of this program",
        )


def split_digest(split: Split) -> str:
    """SHA-256 (hex) of which ids are trained on, validated on and tested on."""
    rows = {part: getattr(split, part).tolist() for part in ("train", "validation", "test")}
    values: dict[str, Any] = {"ids": split.ids, **rows}
    values["folds"] = [fold.tolist() for fold in split.folds]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _plain(values: dict[str, Any]) -> Any:
    """As JSON gives it back, so that two of them can be compared."""
    return json.loads(json.dumps(values))
