"""How the runs of a study end in MLflow: refused, interrupted, killed, joined by others."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from core.errors import InputError
from tuner.studies.outcomes import EndedTrial

from .tracked import assert_written, outcome, runs_of, tracker_of, write_trials

pytestmark = pytest.mark.usefixtures("quick_delivery")


def test_a_start_that_is_refused_is_said_before_any_trial(tracking_server: str, name: str) -> None:
    tracker = tracker_of(tracking_server, name, experiment="other", artifacts="s3://bucket/#part")
    tracker.start_study({})
    tracker.trial_started(0, {})
    with pytest.raises(InputError, match=r"MLflow refused 1 writes .*fragments"):
        tracker.check_started()
    tracker.close()


def test_a_write_that_is_refused_does_not_hold_up_the_others(
    tracking_server: str, name: str
) -> None:
    tracker = tracker_of(tracking_server, name)
    tracker.start_study({})
    for number in range(3):
        tracker.trial_started(number, {"lr": number})
    tracker.flush()
    _, children = runs_of(tracking_server, name)
    client = MlflowClient(tracking_server)
    client.delete_run(children[1][0].info.run_id)  # By a person, in MLflow's pages.
    for number in range(3):
        tracker.trial_ended(number, {"lr": number}, outcome(number))
    tracker.end_study()
    with pytest.raises(InputError, match="MLflow refused 1 writes"):
        tracker.flush()
    tracker.close()
    (parent,), children = runs_of(tracking_server, name)
    assert parent.info.status == "FINISHED"
    assert {n: run.info.status for n, (run,) in children.items()} == {0: "FINISHED", 2: "FINISHED"}
    again = tracker_of(tracking_server, name)
    again.start_study({})
    ends = {n: EndedTrial(number=n, settings={"lr": n}, outcome=outcome(n)) for n in range(3)}
    again.repair(ends, list(ends))
    again.end_study()
    again.flush()
    again.close()
    assert_written(tracking_server, name, range(3))


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_an_error_after_some_trials_leaves_no_run_running(
    tracking_server: str, name: str, status: str
) -> None:
    tracker = tracker_of(tracking_server, name)
    tracker.start_study({})
    write_trials(tracker, range(1))
    tracker.trial_started(1, {"lr": 1})
    assert tracker.abandon(status) == ""
    tracker.close()
    (parent,), children = runs_of(tracking_server, name)
    assert parent.info.status == status
    assert children[0][0].info.status == "FINISHED"
    assert children[1][0].info.status == "KILLED"
    assert children[1][0].data.tags["tuner.status"] == "interrupted"
    # Taken up again: the same run, which ends like any other.
    again = tracker_of(tracking_server, name)
    again.start_study({})
    write_trials(again, range(1, 2))
    again.end_study()
    again.flush()
    again.close()
    assert assert_written(tracking_server, name, range(2)).info.status == "FINISHED"


def test_runs_that_a_killed_session_left_running_are_closed(
    tracking_server: str, name: str
) -> None:
    killed = tracker_of(tracking_server, name)
    killed.start_study({})
    killed.trial_started(0, {"lr": 0})
    killed.trial_started(1, {"lr": 1})
    killed.flush()
    killed._delivery.give_up()
    again = tracker_of(tracking_server, name)
    again.start_study({})
    write_trials(again, range(1))
    assert again.abandon("KILLED") == ""
    again.close()
    (parent,), children = runs_of(tracking_server, name)
    states = {n: run.info.status for n, (run,) in children.items()}
    assert (parent.info.status, states) == ("KILLED", {0: "FINISHED", 1: "KILLED"})


def test_who_joins_a_study_leaves_parent_and_others_trials_alone(
    tracking_server: str, name: str
) -> None:
    first, second = tracker_of(tracking_server, name), tracker_of(tracking_server, name)
    first.start_study({})
    first.trial_started(0, {"lr": 0})
    first.flush()
    second.start_study({}, joined=True)
    write_trials(second, range(1, 2))
    second.trial_started(2, {"lr": 2})
    second.end_study("FINISHED")
    second.withdraw_study()
    second.flush()
    second.close()
    (parent,), children = runs_of(tracking_server, name)
    states = {n: run.info.status for n, (run,) in children.items()}
    assert (parent.info.status, states) == ("RUNNING", {0: "RUNNING", 1: "FINISHED", 2: "KILLED"})
    # The first takes over what the second left: it asks for its run, and makes no other.
    first.learn_runs()
    first.trial_ended(0, {"lr": 0}, outcome(0))
    write_trials(first, range(2, 3))
    first.end_study()
    first.flush()
    first.close()
    assert_written(tracking_server, name, range(3))


def test_a_study_that_never_began_leaves_no_run(tracking_server: str, name: str) -> None:
    tracker = tracker_of(tracking_server, name)
    tracker.start_study({})
    tracker.withdraw_study()
    tracker.withdraw_study()
    tracker.flush()
    tracker.close()
    assert runs_of(tracking_server, name) == ([], {})
