"""A study in a real MLflow server on sqlite: written exactly once, whatever is lost on the way."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from rich.console import Console

import tuner.tracking.delivery
import tuner.tracking.packaging
import tuner.tracking.tracker
from core.encoding.encoders import build_encoder
from core.errors import InputError
from core.heads import build_head
from core.models.model import save_model
from core.report import Outcome, Status
from tests.lossy_proxy import LossyProxy, lossy_proxy
from tests.servers import mlflow_server
from tuner.finalists.winner import example_picture
from tuner.spaces.space import load_space
from tuner.studies.outcomes import EndedTrial
from tuner.tracking.mlflow_store import (
    find_experiment,
    may_pass,
    quiet_mlflow,
    reason,
    tracked_studies,
)
from tuner.tracking.packaging import ModelVersionInfo, build_model, log_model
from tuner.tracking.tracker import Tracker
from tuner.views.live import StudyView

EPOCHS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    quiet_mlflow()
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder) as address:
        yield address


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner.tracking.delivery, "FIRST_PAUSE", 0.02)


@pytest.fixture
def proxy(server: str) -> Iterator[LossyProxy]:
    with lossy_proxy(server) as proxy:
        yield proxy


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a study that no other test has."""
    return str(request.node.name)[:80].replace("[", "-").replace("]", "")


def tracker_of(address: str, study: str, **options: Any) -> Tracker:
    settings: dict[str, Any] = {
        "experiment": "posters", "artifacts": Path("/nowhere"), "study": study,
        "objective": "top3_accuracy", "floor": 0.3,
    }  # fmt: skip
    return Tracker(address, **(settings | options))


def outcome(number: int, status: Status = Status.COMPLETE) -> Outcome:
    """Of a trial with values of its own: one trial's points are not taken for another's."""
    curve = tuple(
        {"validation_top3_accuracy": 0.4 + number / 10 + epoch / 100} for epoch in range(EPOCHS)
    )
    return Outcome(
        status=status,
        curve=curve,
        best_epoch=EPOCHS,
        best_value=curve[-1]["validation_top3_accuracy"],
        seconds=1.5,
        ended=1_700_000_000.25 + number,
    )


def runs_of(server: str, study: str) -> tuple[list[Any], dict[int, list[Any]]]:
    """Parents, and children by trial number, as MLflow shows them."""
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("posters")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`tuner.study` = '{study}'")
    children: dict[int, list[Any]] = {}
    for run in runs:
        if run.data.tags["tuner.trial"] != "study":
            children.setdefault(int(run.data.tags["tuner.trial"]), []).append(run)
    return [run for run in runs if run.data.tags["tuner.trial"] == "study"], children


def assert_written(server: str, study: str, numbers: range) -> Any:
    """One parent, one child a trial with one point an epoch; returns the parent."""
    (parent,), children = runs_of(server, study)
    assert sorted(children) == list(numbers)
    client = MlflowClient(server)
    for number, runs in children.items():
        (child,) = runs
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.info.status, child.data.tags["tuner.status"]) == ("FINISHED", "complete")
        assert child.data.params["lr"] == str(number)
        points = client.get_metric_history(child.info.run_id, "validation_top3_accuracy")
        expected = [c["validation_top3_accuracy"] for c in outcome(number).curve]
        points.sort(key=lambda point: point.step)
        assert [point.value for point in points] == pytest.approx(expected)
        assert [point.step for point in points] == [1, 2, 3]
        assert {point.timestamp for point in points} == {child.info.end_time}
    return parent


def write_trials(tracker: Tracker, numbers: range) -> None:
    for number in numbers:
        tracker.trial_started(number, {"lr": number})
        tracker.trial_ended(number, {"lr": number}, outcome(number))


def test_a_study_is_made_once_though_every_answer_is_lost(
    server: str, proxy: LossyProxy, name: str, tmp_path: Path
) -> None:
    """The server does each thing and the answer never comes, the first time it is asked."""
    seen: set[tuple[str, str]] = set()

    def loses(method: str, path: str, body: bytes) -> bool:
        if method == "GET" or path.endswith("/search"):
            return False
        values = json.loads(body) if body.startswith(b"{") else {}
        if "runs/create" in path:  # Its time of birth differs from try to try.
            values = [t for t in values["tags"] if t["key"] == "tuner.trial"]
        first = (path, str(values)) not in seen
        seen.add((path, str(values)))
        return first

    proxy.loses = loses
    (tmp_path / "study.json").write_text("{}")
    tracker = tracker_of(proxy.address, name, experiment="posters")
    tracker.start_study({"sampler": "tpe"}, [tmp_path / "study.json"])
    write_trials(tracker, range(3))
    tracker.log_study({"test_top3_accuracy": 0.6}, {"tuner.winner": 2})
    tracker.mark_winner(2)
    tracker.end_study()
    tracker.flush()
    tracker.close()
    kinds = {path.rpartition("mlflow/")[2] for path in proxy.lost}
    assert {"runs/create", "runs/log-batch", "runs/update"} <= kinds
    assert sum("runs/create" in path for path in proxy.lost) == 4
    parent = assert_written(server, name, range(3))
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"sampler": "tpe"}
    client = MlflowClient(server)
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["study.json"]
    assert len(client.get_metric_history(parent.info.run_id, "test_top3_accuracy")) == 1
    _, children = runs_of(server, name)
    winners = [n for n, (run,) in children.items() if "tuner.winner" in run.data.tags]
    assert winners == [2]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    encoder = build_encoder("ffn", weights="none", input_size=16)
    save_model(
        folder, encoder=encoder, head_spec={"kind": "linear"}, class_names=["a", "b", "c"],
        head=build_head("linear", num_features=encoder.num_features, num_classes=3, seed=1),
        pooling="avg", input_size=16,
    )  # fmt: skip
    return folder


def test_a_model_is_registered_once_though_every_answer_is_lost(
    server: str, proxy: LossyProxy, name: str, saved_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its files are made once here: with a real MLflow model, each of the tries takes seconds."""
    build_model(saved_model, tmp_path / "built", input_example_bytes=example_picture())
    monkeypatch.setattr(
        tuner.tracking.packaging,
        "build_model",
        lambda _, folder, **__: shutil.copytree(tmp_path / "built", folder),
    )
    seen: set[str] = set()

    def loses(method: str, path: str, body: bytes) -> bool:
        key = f"{method} {'a file' if 'mlflow-artifacts' in path else path}"
        first = key not in seen
        seen.add(key)
        return first and method != "GET" and not path.endswith("/search")

    tracker = tracker_of(proxy.address, name)
    tracker.start_study({})
    tracker.flush()
    proxy.loses = loses

    def register() -> ModelVersionInfo:
        return log_model(
            saved_model,
            run_id=tracker.parent_run_id,
            registered_name=name,
            input_example_bytes=example_picture(),
            tracking_uri=proxy.address,
            tags={"tuner.study": name},
        )

    info = tracker.ask(register)
    assert tracker.ask(register) == info  # By a resumed study, which comes to the same winner.
    tracker.end_study()
    tracker.flush()
    tracker.close()
    kinds = " ".join(proxy.lost)
    for kind in ("logged-models", "registered-models/create", "model-versions/create", "/alias"):
        assert kind in kinds
    client = MlflowClient(server)
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert (str(version.version), version.run_id) == ("1", tracker.parent_run_id)
    run = client.get_run(tracker.parent_run_id)
    query = f"source_run_id = '{tracker.parent_run_id}'"
    (logged,) = client.search_logged_models([run.info.experiment_id], filter_string=query)
    assert (logged.model_id, logged.status) == (info.model_id, "READY")
    assert [output.model_id for output in run.outputs.model_outputs] == [info.model_id]
    assert client.get_model_version_by_alias(name, "challenger").version == version.version


def test_a_run_that_was_made_after_all_is_one_in_the_end(
    server: str, proxy: LossyProxy, name: str
) -> None:
    """The worst case: the server did what it was asked for only after we had looked for it."""
    tracker = tracker_of(proxy.address, name)
    tracker.start_study({})
    write_trials(tracker, range(2))
    proxy.loses = lambda method, path, body: path.endswith("runs/log-batch") and not proxy.lost
    write_trials(tracker, range(2, 3))
    tracker.flush()
    (parent,), _ = runs_of(server, name)
    client = MlflowClient(server)
    late = client.create_run(
        parent.info.experiment_id,
        tags={"tuner.study": name, "tuner.trial": "1", "mlflow.parentRunId": parent.info.run_id},
    )
    tracker.end_study()
    tracker.flush()
    tracker.close()
    assert_written(server, name, range(3))
    assert client.get_run(late.info.run_id).info.lifecycle_stage == "deleted"


def test_a_study_goes_on_while_mlflow_is_away(server: str, proxy: LossyProxy, name: str) -> None:
    lines: list[str] = []
    delivery = tuner.tracking.tracker.mlflow_delivery(lines.append)
    tracker = tracker_of(proxy.address, name, delivery=delivery)
    tracker.start_study({})
    write_trials(tracker, range(1))
    tracker.flush()
    assert tracker.away == "" and lines == []
    proxy.away = True
    write_trials(tracker, range(1, 4))
    give_up = time.monotonic() + 20
    while not tracker.away:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert tracker.away.startswith("MLflow away since ") and tracker.away.endswith("6 waiting")
    proxy.away = False
    tracker.end_study()
    tracker.flush()
    tracker.close()
    assert_written(server, name, range(4))
    assert len(lines) == 2 and "the study goes on" in lines[0] and lines[1] == "MLflow is back"


def test_both_parts_of_a_study_are_written_in_one_order(
    server: str, proxy: LossyProxy, name: str
) -> None:
    """The second marks a trial of the first as the winner, whose run is not there yet."""
    delivery = tuner.tracking.tracker.mlflow_delivery()
    first = tracker_of(proxy.address, name, delivery=delivery)
    second = tracker_of(proxy.address, f"{name}-finetune", delivery=delivery)
    proxy.away = True
    first.start_study({})
    write_trials(first, range(2))
    first.end_study()
    second.start_study({})
    second.mark_winner(1, name)
    second.end_study()
    proxy.away = False
    second.flush()
    second.close()
    first.flush()
    first.close()
    assert_written(server, name, range(2))
    _, children = runs_of(server, name)
    assert [n for n, (run,) in children.items() if "tuner.winner" in run.data.tags] == [1]


def test_the_live_view_says_that_mlflow_is_away(proxy: LossyProxy, name: str) -> None:
    stream = io.StringIO()
    view = StudyView(Console(file=stream, width=300), load_space("demo"), budget=3, floor=0.4)
    tracker = tracker_of(proxy.address, name)
    view.tracking_away = lambda: tracker.away
    proxy.away = True
    for number, is_away in enumerate((False, True)):
        with view.showing():
            view.trial_ended(number, {}, outcome(number))
        assert ("MLflow away since" in stream.getvalue()) is is_away
        tracker.start_study({})
        tracker.check_started()
    tracker._delivery.give_up()


def test_what_could_not_be_written_is_written_by_a_resumed_study(
    server: str, proxy: LossyProxy, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuner.tracking.tracker, "END_SECONDS", 1)
    monkeypatch.setattr(tuner.tracking.tracker, "INTERRUPTED_SECONDS", 1)
    (tmp_path / "split.json").write_text("[]")
    first = tracker_of(proxy.address, name)
    first.start_study({"seed": 1})
    write_trials(first, range(2))
    first.trial_started(2, {"lr": 2})
    first.flush()
    proxy.away = True
    first.trial_ended(2, {"lr": 2}, outcome(2))
    write_trials(first, range(3, 5))
    first.end_study()
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        first.flush()
    message = str(caught.value)
    assert "could not be written for 1 s" in message and "7 writes wait" in message
    assert f"--tracking-uri {proxy.address}" in message and f"tuner resume {name}" in message
    first.close()
    assert time.monotonic() - started < 8
    (parent,), children = runs_of(server, name)
    assert parent.info.status == "RUNNING" and sorted(children) == [0, 1, 2]
    proxy.away = False
    second = tracker_of(proxy.address, name)
    second.start_study({"seed": 1, "sampler": "tpe"}, [tmp_path / "split.json"])
    second.check_started()
    assert second.parent_run_id == parent.info.run_id
    ends = {n: EndedTrial(number=n, settings={"lr": n}, outcome=outcome(n)) for n in range(5)}
    second.repair(ends, list(ends))
    second.end_study()
    second.flush()
    second.close()
    parent = assert_written(server, name, range(5))
    assert parent.info.status == "FINISHED"
    # What a kill between making the parent and filling it had left out.
    assert parent.data.params == {"seed": "1", "sampler": "tpe"}
    files = MlflowClient(server).list_artifacts(parent.info.run_id)
    assert [file.path for file in files] == ["split.json"]


def test_a_start_that_is_refused_is_said_before_any_trial(server: str, name: str) -> None:
    tracker = tracker_of(server, name, experiment="other", artifacts="s3://bucket/#part")
    tracker.start_study({})
    tracker.trial_started(0, {})
    with pytest.raises(InputError, match=r"MLflow refused 1 writes .*fragments"):
        tracker.check_started()
    tracker.close()


def test_a_write_that_is_refused_does_not_hold_up_the_others(server: str, name: str) -> None:
    tracker = tracker_of(server, name)
    tracker.start_study({})
    for number in range(3):
        tracker.trial_started(number, {"lr": number})
    tracker.flush()
    _, children = runs_of(server, name)
    client = MlflowClient(server)
    client.delete_run(children[1][0].info.run_id)  # By a person, in MLflow's pages.
    for number in range(3):
        tracker.trial_ended(number, {"lr": number}, outcome(number))
    tracker.end_study()
    with pytest.raises(InputError, match="MLflow refused 1 writes"):
        tracker.flush()
    tracker.close()
    (parent,), children = runs_of(server, name)
    assert parent.info.status == "FINISHED"
    assert {n: run.info.status for n, (run,) in children.items()} == {0: "FINISHED", 2: "FINISHED"}
    again = tracker_of(server, name)
    again.start_study({})
    ends = {n: EndedTrial(number=n, settings={"lr": n}, outcome=outcome(n)) for n in range(3)}
    again.repair(ends, list(ends))
    again.end_study()
    again.flush()
    again.close()
    assert_written(server, name, range(3))


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_an_error_after_some_trials_leaves_no_run_running(
    server: str, name: str, status: str
) -> None:
    tracker = tracker_of(server, name)
    tracker.start_study({})
    write_trials(tracker, range(1))
    tracker.trial_started(1, {"lr": 1})
    assert tracker.abandon(status) == ""
    tracker.close()
    (parent,), children = runs_of(server, name)
    assert parent.info.status == status
    assert children[0][0].info.status == "FINISHED"
    assert children[1][0].info.status == "KILLED"
    assert children[1][0].data.tags["tuner.status"] == "interrupted"
    # Taken up again: the same run, which ends like any other.
    again = tracker_of(server, name)
    again.start_study({})
    write_trials(again, range(1, 2))
    again.end_study()
    again.flush()
    again.close()
    assert assert_written(server, name, range(2)).info.status == "FINISHED"


def test_runs_that_a_killed_session_left_running_are_closed(server: str, name: str) -> None:
    killed = tracker_of(server, name)
    killed.start_study({})
    killed.trial_started(0, {"lr": 0})
    killed.trial_started(1, {"lr": 1})
    killed.flush()
    killed._delivery.give_up()
    again = tracker_of(server, name)
    again.start_study({})
    write_trials(again, range(1))
    assert again.abandon("KILLED") == ""
    again.close()
    (parent,), children = runs_of(server, name)
    states = {n: run.info.status for n, (run,) in children.items()}
    assert (parent.info.status, states) == ("KILLED", {0: "FINISHED", 1: "KILLED"})


def test_who_joins_a_study_leaves_parent_and_others_trials_alone(server: str, name: str) -> None:
    first, second = tracker_of(server, name), tracker_of(server, name)
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
    (parent,), children = runs_of(server, name)
    states = {n: run.info.status for n, (run,) in children.items()}
    assert (parent.info.status, states) == ("RUNNING", {0: "RUNNING", 1: "FINISHED", 2: "KILLED"})
    # The first takes over what the second left: it asks for its run, and makes no other.
    first.learn_runs()
    first.trial_ended(0, {"lr": 0}, outcome(0))
    write_trials(first, range(2, 3))
    first.end_study()
    first.flush()
    first.close()
    assert_written(server, name, range(3))


def test_a_study_that_never_began_leaves_no_run(server: str, name: str) -> None:
    tracker = tracker_of(server, name)
    tracker.start_study({})
    tracker.withdraw_study()
    tracker.withdraw_study()
    tracker.flush()
    tracker.close()
    assert runs_of(server, name) == ([], {})


def test_of_two_parents_the_one_with_the_trials_stays(server: str, name: str) -> None:
    tracker = tracker_of(server, name)
    tracker.start_study({})
    write_trials(tracker, range(2))
    tracker.flush()
    parent = tracker.parent_run_id
    tracker._delivery.give_up()
    client = MlflowClient(server)
    experiment = client.get_run(parent).info.experiment_id
    other = client.create_run(
        experiment, start_time=1, tags={"tuner.study": name, "tuner.trial": "study"}
    )
    again = tracker_of(server, name)
    again.start_study({})
    again.end_study()
    again.flush()
    again.close()
    assert again.parent_run_id == parent
    assert client.get_run(other.info.run_id).info.lifecycle_stage == "deleted"
    assert_written(server, name, range(2))


def test_what_the_parent_says_twice_is_one_point(server: str, name: str) -> None:
    for value, points in ((0.5, 1), (0.5, 1), (0.75, 2)):
        tracker = tracker_of(server, name)
        tracker.start_study({})
        tracker.log_study({"optimism": value, "test_macro_f1": 0.25}, {"tuner.winner": 1})
        tracker.end_study()
        tracker.flush()
        tracker.close()
        client = MlflowClient(server)
        parent = tracker.parent_run_id
        assert len(client.get_metric_history(parent, "optimism")) == points
        assert len(client.get_metric_history(parent, "test_macro_f1")) == 1


def test_weights_do_not_wait_with_their_trial(server: str, name: str) -> None:
    import gc
    import weakref

    import torch

    weights = torch.zeros(3)
    watched = weakref.ref(weights)
    with lossy_proxy(server) as proxy:
        proxy.away = True
        tracker = tracker_of(proxy.address, name)
        tracker.start_study({})
        tracker.trial_ended(0, {}, replace(outcome(0), state={"head": weights}))
        del weights
        gc.collect()
        assert watched() is None
        tracker._delivery.give_up()


def test_passwords_stay_out_of_messages(name: str) -> None:
    tracker = tracker_of("http://me:secret@127.0.0.1:1", name)
    tracker.start_study({})
    with pytest.raises(InputError) as caught:
        tracker.flush(limit=0.5)
    tracker.close()
    assert "secret" not in str(caught.value) and "Connection refused" in str(caught.value)


def test_names_of_studies_are_found_without_making_a_store(
    server: str, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "mlflow.db"
    assert tracked_studies(f"sqlite:///{file}", "posters") == set()
    assert find_experiment(f"sqlite:///{file}", "posters") is None
    assert not file.exists()
    tracker = tracker_of(server, name)
    tracker.start_study({})
    tracker.flush()
    tracker.close()
    assert name in tracked_studies(server, "posters")
    assert tracked_studies(server, "no such experiment") == set()


def test_what_may_pass_is_told_from_what_is_wrong(server: str) -> None:
    client = MlflowClient(server)
    run = client.create_run("0")
    with pytest.raises(MlflowException) as caught:
        client.log_batch(run.info.run_id, metrics=[Metric("a" * 300, 1.0, 1, 1)])
    assert not may_pass(caught.value)
    with pytest.raises(MlflowException) as caught:
        client.get_run("nobody")
    assert not may_pass(caught.value)
    with pytest.raises(MlflowException) as caught:
        MlflowClient("http://127.0.0.1:1").get_run("nobody")
    assert may_pass(caught.value) and reason(caught.value) == "Connection refused"
    full = OSError(28, "No space left on device")
    assert may_pass(full) and reason(full) == "No space left on device"
    assert not may_pass(InputError("x", where="y"))
    assert not may_pass(TypeError())


def test_a_database_that_was_restarted_may_pass() -> None:
    from sqlalchemy.exc import DBAPIError

    broken = MlflowException("gone", error_code=BAD_REQUEST)  # As MLflow says of any such error.
    broken.__cause__ = DBAPIError("SELECT 1", {}, Exception(), connection_invalidated=True)
    assert broken.error_code == "BAD_REQUEST"
    assert may_pass(broken)
    broken.__cause__ = DBAPIError("SELECT 1", {}, Exception())
    assert not may_pass(broken)
