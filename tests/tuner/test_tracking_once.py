"""A study in a real MLflow server on sqlite: written exactly once, whatever is lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

import tuner.tracking.packaging
import tuner.tracking.tracker
from core.encoding.encoders import build_encoder
from core.heads import build_head
from core.models.model import save_model
from tuner.finalists.winner import example_picture
from tuner.tracking.packaging import ModelVersionInfo, build_model, log_model

from ..lossy_proxy import LossyProxy
from .tracked import assert_written, runs_of, tracker_of, write_trials

pytestmark = pytest.mark.usefixtures("quick_delivery")


def test_a_study_is_made_once_though_every_answer_is_lost(
    tracking_server: str, tracking_proxy: LossyProxy, name: str, tmp_path: Path
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

    tracking_proxy.loses = loses
    (tmp_path / "study.json").write_text("{}")
    tracker = tracker_of(tracking_proxy.address, name, experiment="posters")
    tracker.start_study({"sampler": "tpe"}, [tmp_path / "study.json"])
    write_trials(tracker, range(3))
    tracker.log_study({"test_top3_accuracy": 0.6}, {"tuner.winner": 2})
    tracker.mark_winner(2)
    tracker.end_study()
    tracker.flush()
    tracker.close()
    kinds = {path.rpartition("mlflow/")[2] for path in tracking_proxy.lost}
    assert {"runs/create", "runs/log-batch", "runs/update"} <= kinds
    assert sum("runs/create" in path for path in tracking_proxy.lost) == 4
    parent = assert_written(tracking_server, name, range(3))
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"sampler": "tpe"}
    client = MlflowClient(tracking_server)
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["study.json"]
    assert len(client.get_metric_history(parent.info.run_id, "test_top3_accuracy")) == 1
    _, children = runs_of(tracking_server, name)
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
    tracking_server: str, tracking_proxy: LossyProxy, name: str, saved_model: Path, tmp_path: Path,
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

    tracker = tracker_of(tracking_proxy.address, name)
    tracker.start_study({})
    tracker.flush()
    tracking_proxy.loses = loses

    def register() -> ModelVersionInfo:
        return log_model(
            saved_model,
            run_id=tracker.parent_run_id,
            registered_name=name,
            input_example_bytes=example_picture(),
            tracking_uri=tracking_proxy.address,
            tags={"tuner.study": name},
        )

    info = tracker.ask(register)
    assert tracker.ask(register) == info  # By a resumed study, which comes to the same winner.
    tracker.end_study()
    tracker.flush()
    tracker.close()
    kinds = " ".join(tracking_proxy.lost)
    for kind in ("logged-models", "registered-models/create", "model-versions/create", "/alias"):
        assert kind in kinds
    client = MlflowClient(tracking_server)
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert (str(version.version), version.run_id) == ("1", tracker.parent_run_id)
    run = client.get_run(tracker.parent_run_id)
    query = f"source_run_id = '{tracker.parent_run_id}'"
    (logged,) = client.search_logged_models([run.info.experiment_id], filter_string=query)
    assert (logged.model_id, logged.status) == (info.model_id, "READY")
    assert [output.model_id for output in run.outputs.model_outputs] == [info.model_id]
    assert client.get_model_version_by_alias(name, "challenger").version == version.version


def test_a_run_that_was_made_after_all_is_one_in_the_end(
    tracking_server: str, tracking_proxy: LossyProxy, name: str
) -> None:
    """The worst case: the server did what it was asked for only after we had looked for it."""
    tracker = tracker_of(tracking_proxy.address, name)
    tracker.start_study({})
    write_trials(tracker, range(2))
    tracking_proxy.loses = lambda method, path, body: (
        path.endswith("runs/log-batch") and not tracking_proxy.lost
    )
    write_trials(tracker, range(2, 3))
    tracker.flush()
    (parent,), _ = runs_of(tracking_server, name)
    client = MlflowClient(tracking_server)
    late = client.create_run(
        parent.info.experiment_id,
        tags={"tuner.study": name, "tuner.trial": "1", "mlflow.parentRunId": parent.info.run_id},
    )
    tracker.end_study()
    tracker.flush()
    tracker.close()
    assert_written(tracking_server, name, range(3))
    assert client.get_run(late.info.run_id).info.lifecycle_stage == "deleted"


def test_both_parts_of_a_study_are_written_in_one_order(
    tracking_server: str, tracking_proxy: LossyProxy, name: str
) -> None:
    """The second marks a trial of the first as the winner, whose run is not there yet."""
    delivery = tuner.tracking.tracker.mlflow_delivery()
    first = tracker_of(tracking_proxy.address, name, delivery=delivery)
    second = tracker_of(tracking_proxy.address, f"{name}-finetune", delivery=delivery)
    tracking_proxy.away = True
    first.start_study({})
    write_trials(first, range(2))
    first.end_study()
    second.start_study({})
    second.mark_winner(1, name)
    second.end_study()
    tracking_proxy.away = False
    second.flush()
    second.close()
    first.flush()
    first.close()
    assert_written(tracking_server, name, range(2))
    _, children = runs_of(tracking_server, name)
    assert [n for n, (run,) in children.items() if "tuner.winner" in run.data.tags] == [1]


def test_of_two_parents_the_one_with_the_trials_stays(tracking_server: str, name: str) -> None:
    tracker = tracker_of(tracking_server, name)
    tracker.start_study({})
    write_trials(tracker, range(2))
    tracker.flush()
    parent = tracker.parent_run_id
    tracker._delivery.give_up()
    client = MlflowClient(tracking_server)
    experiment = client.get_run(parent).info.experiment_id
    other = client.create_run(
        experiment, start_time=1, tags={"tuner.study": name, "tuner.trial": "study"}
    )
    again = tracker_of(tracking_server, name)
    again.start_study({})
    again.end_study()
    again.flush()
    again.close()
    assert again.parent_run_id == parent
    assert client.get_run(other.info.run_id).info.lifecycle_stage == "deleted"
    assert_written(tracking_server, name, range(2))


def test_what_the_parent_says_twice_is_one_point(tracking_server: str, name: str) -> None:
    for value, points in ((0.5, 1), (0.5, 1), (0.75, 2)):
        tracker = tracker_of(tracking_server, name)
        tracker.start_study({})
        tracker.log_study({"optimism": value, "test_macro_f1": 0.25}, {"tuner.winner": 1})
        tracker.end_study()
        tracker.flush()
        tracker.close()
        client = MlflowClient(tracking_server)
        parent = tracker.parent_run_id
        assert len(client.get_metric_history(parent, "optimism")) == points
        assert len(client.get_metric_history(parent, "test_macro_f1")) == 1
