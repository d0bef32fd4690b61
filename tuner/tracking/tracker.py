"""A study in MLflow, as the search sees it: what is to be written is put here, and waited for.

Writing happens in one thread beside the search (`delivery.py`), which waits for as long as MLflow
is away; every trial's end is in `outcomes.jsonl` before, so that a resumed study can write what
never arrived (`repair`). What is written, and how it is never written twice, is in `study_runs.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import InputError
from core.report import Outcome

from ..addresses import without_password
from .delivery import Away, Delivery
from .mlflow_store import may_pass, reason
from .study_runs import StudyRuns

if TYPE_CHECKING:
    from ..studies.outcomes import EndedTrial

END_SECONDS = 120
"""How long the end of a study waits for an MLflow that does not answer."""
INTERRUPTED_SECONDS = 10
"""The same where the study was interrupted: whoever did that wants it to end."""
Answer = TypeVar("Answer")


def mlflow_delivery(say: Callable[[str], None] | None = None) -> Delivery:
    """A writer to MLflow. `say` hears a line when MLflow goes away, and when it is back."""

    def tell(away: Away | None) -> None:
        if say is not None:
            say("MLflow is back" if away is None else f"{away_text(away)}: the study goes on")

    return Delivery(may_pass, tell)


def away_text(away: Away | None) -> str:
    """Since when MLflow does not answer, as the live view shows it; empty while it does."""
    if away is None:
        return ""
    since = time.strftime("%H:%M:%S", time.localtime(away.since))
    return f"MLflow away since {since} ({reason(away.error)}), {away.waiting} waiting"


class Tracker:
    """Writes a study's runs; a `Watcher` of the searcher.

    Args:
        tracking_uri: MLflow's address.
        experiment: made if it is not there.
        artifacts: where a new experiment keeps artifacts: a URL, or a folder for stores without a
            server.
        study: the study's name.
        objective: name of the validation metric that is a trial's value.
        floor: the objective that a model reaches without looking: trials that do not exceed it
            are tagged as having learnt nothing.
        delivery: who writes; None for a thread of the tracker's own. Studies that mark each
            other's winners share one.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment: str,
        artifacts: Path | str,
        study: str,
        objective: str,
        floor: float,
        delivery: Delivery | None = None,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.ended = ""
        """The status that the study was given at its end."""
        self._joined = False
        self._study = study
        self._delivery = delivery or mlflow_delivery()
        self._runs = StudyRuns(
            tracking_uri,
            experiment=experiment,
            artifacts=artifacts,
            study=study,
            objective=objective,
            floor=floor,
        )

    @property
    def experiment_id(self) -> str:
        """Empty until MLflow has been reached."""
        return self._runs.experiment_id

    @property
    def parent_run_id(self) -> str:
        """Empty until MLflow has been reached."""
        return self._runs.parent_run_id

    @property
    def away(self) -> str:
        """What a person sees while MLflow does not answer; empty while it does."""
        return away_text(self._delivery.away)

    # ---- the study ------------------------------------------------------------------------

    def start_study(
        self, params: Mapping[str, Any], artifacts: Sequence[Path] = (), *, joined: bool = False
    ) -> None:
        """Find or make the parent run, and learn which trials have runs. `joined`: another process
        leads the study, so its parent and the trials that run are left as they are, at the end,
        too."""
        self._joined = joined
        self._delivery.put(
            lambda: self._runs.start_study(params, artifacts, joined=joined), essential=True
        )

    def check_started(self) -> None:
        """Wait until the runs are known, unless MLflow is away: then the study goes on without.

        Raises InputError if MLflow refuses the study."""
        self._delivery.settled()
        if not self.parent_run_id and self._delivery.refused:
            raise self._refused()

    def learn_runs(self) -> None:
        """Ask MLflow again which trials have runs: another process may have begun some since."""
        self._delivery.put(self._runs.learn)

    def end_study(self, status: str = "FINISHED") -> None:
        """Close the parent run, unless the study is another process's that we joined, and the run
        of any trial that has no end."""
        self.ended = status
        self._delivery.put(lambda: self._runs.settle(troubled=self._delivery.troubled))
        now = _milliseconds()
        if not self._joined:
            self._delivery.put(lambda: self._runs.end_study(status, now))

    def log_study(self, metrics: Mapping[str, float], tags: Mapping[str, Any]) -> None:
        """Metrics and tags of the parent run. A metric that has the value already gets no further
        point."""
        now = _milliseconds()
        self._delivery.put(lambda: self._runs.log_study(metrics, tags, now))

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Files beside the parent run."""
        self._delivery.put(lambda: self._runs.log_files(paths))

    def withdraw_study(self) -> None:
        """Delete the parent run of a study that never began, which has no trials."""
        if not self._joined:
            self._delivery.put(self._runs.withdraw)

    # ---- trials: a Watcher ----------------------------------------------------------------

    def trial_started(self, number: int, settings: Mapping[str, Any]) -> None:
        self._delivery.put(lambda: self._runs.start_trial(number))

    def cohort_progress(
        self, numbers: Sequence[int], epoch: int, values: Mapping[int, float]
    ) -> None:
        """Nothing: a trial's curve is written at its end, in one batch."""

    def trial_ended(self, number: int, settings: Mapping[str, Any], outcome: Outcome) -> None:
        # Weights must not wait with it for hours.
        slim = dataclasses.replace(outcome, state=None)
        self._delivery.put(lambda: self._runs.end_trial(number, settings, slim))

    def mark_winner(self, number: int, study: str | None = None) -> None:
        """Tag the run of the trial that won, of this study or of the other part of it."""
        self._delivery.put(lambda: self._runs.mark_winner(number, study or self._study))

    def mark_front(self, numbers: Sequence[int], study: str | None = None) -> None:
        """Tag the runs of the trials on the Pareto front, and no others of this study, or of the
        other part of it."""
        self._delivery.put(lambda: self._runs.mark_front(numbers, study or self._study))

    def repair(self, ended: Mapping[int, EndedTrial], numbers: Sequence[int]) -> None:
        """Write the ends that MLflow missed, of trials that have one (`numbers`)."""
        for number in numbers:
            if number in ended:
                self._delivery.put(lambda trial=ended[number]: self._runs.repair(trial))  # type: ignore[misc]

    def trials_interrupted(self, numbers: Sequence[int]) -> None:
        """Trials that a later session will take up again: no run is left RUNNING meanwhile."""
        for number in numbers:
            self._delivery.put(lambda number=number: self._runs.interrupt(number))  # type: ignore[misc]

    # ---- waiting --------------------------------------------------------------------------

    def flush(self, limit: float | None = None) -> None:
        """Wait until all is written; `limit` in seconds without an answer, END_SECONDS if None.

        Raises InputError if MLflow does not answer, or refused anything."""
        limit = END_SECONDS if limit is None else limit
        done = self._delivery.wait(limit)
        if self._delivery.refused:
            raise self._refused()
        if not done:
            raise self._unanswered(limit)

    def ask(self, question: Callable[[], Answer], limit: float | None = None) -> Answer:
        """What `question` returns or raises, in its turn among the writes, tried again like them.

        Raises InputError if MLflow does not answer."""
        limit = END_SECONDS if limit is None else limit
        try:
            return self._delivery.ask(question, limit=limit)
        except TimeoutError as error:
            if self._delivery.refused:
                raise self._refused() from error
            raise self._unanswered(limit) from error

    def abandon(self, status: str) -> str:
        """The study ends here, by an error or an interruption: no run is left RUNNING. Returns
        what a person should know where MLflow does not answer; raises nothing."""
        if not self.ended:
            self.end_study(status)
        waiting, away = self._delivery.waiting, self._delivery.away
        # After an error there is time for what MLflow still takes in; not so after a signal.
        strict = status == "KILLED"
        if self._delivery.wait(INTERRUPTED_SECONDS, strict=strict) or not waiting:
            return ""
        self._delivery.give_up()
        why = "no answer" if away is None else reason(away.error)
        return f"MLflow was not told all of it ({why}): tuner resume {self._study} writes the rest"

    def close(self) -> None:
        """End the writer after what is queued."""
        self._delivery.close(INTERRUPTED_SECONDS)

    def _unanswered(self, limit: float) -> InputError:
        away, waiting = self._delivery.away, self._delivery.waiting
        self._delivery.give_up()
        why = "" if away is None else f" ({reason(away.error)})"
        return InputError(
            f"MLflow could not be written for {limit:.0f} s{why}: {waiting} writes wait",
            where=f"--tracking-uri {without_password(self.tracking_uri)}",
            hint=f"nothing is lost: tuner resume {self._study} writes them once that is mended",
        )

    def _refused(self) -> InputError:
        errors = self._delivery.refused
        first = errors[0]
        if isinstance(first, InputError):
            return first
        problem = InputError(
            f"MLflow refused {len(errors)} writes ({reason(first)})",
            where=f"--tracking-uri {without_password(self.tracking_uri)}",
            hint=f"trials that ended are kept: tuner resume {self._study} writes what is missing",
        )
        problem.__cause__ = first
        return problem


def _milliseconds() -> int:
    return int(time.time() * 1000)
