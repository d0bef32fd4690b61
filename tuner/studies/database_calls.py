"""Calls to Optuna's database that it does not know: keys of calls, and what errors mean.

`tuner.studies.surviving_storage` makes them. A key says which call made or claimed a trial, so that
a call whose answer was lost finds what it did. It is written in the same transaction, in Optuna's
own tables.
"""

from __future__ import annotations

import copy
import datetime
import json
from typing import TYPE_CHECKING

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from core.errors import InputError

from ..addresses import first_line

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext

CREATED = "tuner:created"
"""System attribute of a trial: the key of the call that made it."""
CLAIMED = "tuner:claimed"
"""System attribute of a trial that waited: the key of the call that set it running."""
AWAY_STATES = ("08", "53", "57P")
"""SQLSTATE classes: connection exception, insufficient resources, operator intervention."""


class StorageAwayError(Exception):
    """The database did not answer. Whether it did what it was asked to is not known."""


def wait_for_makers(backend: RDBStorage, study_id: int) -> None:
    """Until no trial of the study is being made: the server may still be at our first try. Whoever
    makes one holds the lock of the study's row."""
    from optuna.storages._rdb import models
    from sqlalchemy.orm import Session

    with Session(backend.engine) as session, session.begin():
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)


def keyed(template: FrozenTrial | None, key: str) -> FrozenTrial:
    """The trial to be made, with the key of the call that makes it; None: a new, running one."""
    if template is not None:
        copied = copy.deepcopy(template)
        copied.system_attrs[CREATED] = key
        return copied
    return FrozenTrial(
        number=-1,  # The storage numbers it.
        trial_id=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={CREATED: key},
        intermediate_values={},
    )


def set_running(backend: RDBStorage, trial_id: int, key: str) -> bool:
    """As RDBStorage.set_trial_state_values, and the key in the same transaction."""
    from optuna.storages._rdb import models
    from sqlalchemy import delete, insert, update

    trials = models.TrialModel.__table__
    attributes = models.TrialSystemAttributeModel.__table__
    waiting = (trials.c.trial_id == trial_id) & (trials.c.state == TrialState.WAITING)
    earlier = (attributes.c.trial_id == trial_id) & (attributes.c.key == CLAIMED)
    with backend.engine.begin() as connection:
        claimed = connection.execute(
            update(trials)
            .where(waiting)
            .values(state=TrialState.RUNNING, datetime_start=datetime.datetime.now())
        ).rowcount
        if claimed:
            connection.execute(delete(attributes).where(earlier))
            connection.execute(
                insert(attributes).values(
                    trial_id=trial_id, key=CLAIMED, value_json=json.dumps(key)
                )
            )
    return bool(claimed)


def translated(context: ExceptionContext) -> Exception | None:
    """What SQLAlchemy raises instead, if the error says that the database is away or full."""
    error = context.original_exception
    if context.is_pre_ping or not isinstance(error, context.dialect.loaded_dbapi.Error):
        return None  # A connection that fails its first ping is replaced by SQLAlchemy.
    reason = first_line(error)
    if context.dialect.name == "sqlite":
        if "is full" in reason or "disk I/O" in reason:
            return InputError(
                f"the study's storage cannot be written ({reason})",
                where="--storage",
                hint="make room on its disk, then go on with: tuner resume STUDY",
            )
        return StorageAwayError(reason) if "locked" in reason else None
    state = getattr(error, "pgcode", None) or getattr(error, "sqlstate", None) or ""
    is_away = context.is_disconnect or context.connection is None or state.startswith(AWAY_STATES)
    return StorageAwayError(reason) if is_away else None
