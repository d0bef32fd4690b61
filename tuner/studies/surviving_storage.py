"""Optuna's database storage, with calls that outlive the database's absence.

A call that the database's absence cut off is tried again until it is answered. Its first try may
have been committed with only the answer lost: a trial and a claim of a waiting trial carry the key
of their call, written in the same transaction, and are looked for before they are made again; what
was told already counts as told; all other writes may be repeated as they are. Optuna itself would
repeat the making of a trial without looking, hence StorageAwayError, which passes it by.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .database_calls import (
    CLAIMED,
    CREATED,
    StorageAwayError,
    keyed,
    set_running,
    translated,
    wait_for_makers,
)
from .outage import Outage

if TYPE_CHECKING:
    from optuna.study._frozen import FrozenStudy

Answer = TypeVar("Answer")


class SurvivingStorage(BaseStorage):
    """Waits while the database is away. `backend` is Optuna's storage, opened."""

    def __init__(self, backend: RDBStorage, outage: Outage) -> None:
        from sqlalchemy import event

        self.outage = outage
        self._backend = backend
        self._storage = get_storage(backend)  # With Optuna's cache of finished trials.
        event.listen(backend.engine, "handle_error", translated)

    def wait(self) -> None:
        """Return once the database answers. Raises InputError after the limit."""
        from sqlalchemy import text

        def ask() -> None:
            with self._backend.engine.connect() as connection:
                connection.execute(text("SELECT 1"))

        self._answer(ask)

    def _answer(
        self, first: Callable[[], Answer], again: Callable[[], Answer] | None = None
    ) -> Answer:
        """What `first` returns, or, once it was cut off, `again`."""
        attempt = 0
        while True:
            began = self.outage.now()
            try:
                answer = (again or first)() if attempt else first()
            except StorageAwayError as error:
                self.outage.wait(attempt, str(error), began=began)
                attempt += 1
            except Exception:
                self.outage.answered(began=began)
                raise
            else:
                self.outage.answered(began=began)
                return answer

    # ---- studies --------------------------------------------------------------------------

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        name = study_name or f"no-name-{uuid.uuid4()}"

        def create() -> int:
            return self._storage.create_new_study(directions, name)

        def again() -> int:
            try:
                return create()
            except DuplicatedStudyError:
                found = self._storage.get_study_id_from_name(name)
                if self._is_new(found):
                    return found
                raise

        return self._answer(create, again)

    def _is_new(self, study_id: int) -> bool:
        """Whether nothing was written to a study since it was made."""
        storage = self._storage
        written = storage.get_study_user_attrs(study_id) or storage.get_study_system_attrs(study_id)
        return not written and not storage.get_all_trials(study_id, deepcopy=False)

    def delete_study(self, study_id: int) -> None:
        def again() -> None:
            try:
                self._storage.delete_study(study_id)
            except KeyError:  # The first try did it.
                return

        self._answer(lambda: self._storage.delete_study(study_id), again)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._answer(lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._answer(lambda: self._storage.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._answer(lambda: self._storage.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._answer(lambda: self._storage.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._answer(lambda: self._storage.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._answer(lambda: self._storage.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._answer(lambda: self._storage.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        return self._answer(self._storage.get_all_studies)

    # ---- trials ---------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        key = uuid.uuid4().hex
        template = keyed(template_trial, key)

        def create() -> int:
            return self._storage.create_new_trial(study_id, template)

        def again() -> int:
            wait_for_makers(self._backend, study_id)
            for trial in self._storage.get_all_trials(study_id, deepcopy=False):
                if trial.system_attrs.get(CREATED) == key:
                    return trial._trial_id
            return create()

        return self._answer(create, again)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state == TrialState.RUNNING:
            return self._claim(trial_id)

        def tell() -> bool:
            return self._storage.set_trial_state_values(trial_id, state, values)

        def again() -> bool:
            try:
                return tell()
            except UpdateFinishedTrialError:
                told = self._storage.get_trial(trial_id)
                if told.state == state and (values is None or told.values == list(values)):
                    return True
                raise

        return self._answer(tell, again)

    def _claim(self, trial_id: int) -> bool:
        """Set a waiting trial running; False if another did, also while we heard nothing."""
        key = uuid.uuid4().hex

        def claim() -> bool:
            if set_running(self._backend, trial_id, key):
                return True
            trial = self._backend.get_trial(trial_id)  # Raises KeyError if there is none.
            self.check_trial_is_updatable(trial_id, trial.state)
            return bool(trial.system_attrs.get(CLAIMED) == key)

        return self._answer(claim)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        self._answer(
            lambda: self._storage.set_trial_param(
                trial_id, param_name, param_value_internal, distribution
            )
        )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        self._answer(
            lambda: self._storage.set_trial_intermediate_value(trial_id, step, intermediate_value)
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._answer(lambda: self._storage.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._answer(lambda: self._storage.set_trial_system_attr(trial_id, key, value))

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._answer(
            lambda: self._storage.get_trial_id_from_study_id_trial_number(study_id, trial_number)
        )

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._answer(lambda: self._storage.get_trial(trial_id))

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        return self._answer(lambda: self._storage.get_all_trials(study_id, deepcopy, states))

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        return self._answer(lambda: self._storage.get_best_trial(study_id))

    def remove_session(self) -> None:
        self._backend.remove_session()
