"""`--artifacts`: what is refused before anything starts, and a model in a store that speaks S3."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from core.encoding.encoders import build_encoder
from core.errors import InputError
from core.heads import build_head
from core.models.model import load_model, save_model
from tests.s3_server import S3Server, s3_server
from tuner.finalists.winner import example_picture
from tuner.predict import load_predictor
from tuner.tracking.artifacts import artifact_url, check_artifacts
from tuner.tracking.mlflow_store import artifact_location
from tuner.tracking.packaging import log_model
from tuner.tracking.tracker import Tracker

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("models")
        yield server


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://models", "s3://models"),
        ("s3://models/a/b/", "s3://models/a/b"),
        ("/shared/my models", "file:///shared/my%20models"),
        ("file:///shared/my%20models", "file:///shared/my%20models"),
    ],
)
def test_address(text: str, url: str) -> None:
    assert artifact_url(text) == url
    assert artifact_url(url) == url


def test_a_folder_is_found_from_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert artifact_url("models") == (tmp_path / "models").as_uri()


ADDRESSES: list[tuple[str, tuple[str, ...]]] = [
    ("gs://bucket/x", ("--artifacts gs://bucket/x", "cannot be kept there", "s3://BUCKET/PREFIX")),
    ("http://host/x", ("--artifacts http://host/x", "cannot be kept there")),
    ("s3://", ("--artifacts s3://", "names no bucket")),
    ("s3://bucket/x?y", ("names no bucket",)),
    ("s3://me:secret@bucket/x", ("s3://***@bucket/x", "keys do not belong", "AWS_ACCESS_KEY_ID")),
    ("/dev/null/models", ("--artifacts", "/dev/null cannot be written", "another folder")),
]


@pytest.mark.parametrize(("address", "says"), ADDRESSES)
def test_refused_address(
    address: str, says: tuple[str, ...], refused: Run, data: Path, space: Path
) -> None:
    message = refused("search", space, "--data", data, "--artifacts", address, says=says)
    assert "secret" not in message


def test_a_bucket_that_cannot_be_used(
    refused: Run, data: Path, space: Path, s3_environment: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def check(bucket: str, *says: str) -> str:
        where = f"s3://{bucket}/runs"
        return str(refused("search", space, "--data", data, "--artifacts", where, says=says))

    check("nowhere", "s3://nowhere at http://127", "there is no such bucket", "its name")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    check("models", "cannot be used", "connect", "MLFLOW_S3_ENDPOINT_URL")
    monkeypatch.setitem(sys.modules, "boto3", None)
    check("models", "a package that is not there", "poster-tuner[s3]")


def test_keys_that_are_missing(
    refused: Run, data: Path, space: Path, s3_environment: S3Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refused(
        "search", space, "--data", data, "--artifacts", "s3://models",
        says=("cannot be used", "credentials", "AWS_ACCESS_KEY_ID"),
    )  # fmt: skip


def test_an_experiment_that_is_elsewhere(
    refused: Run, data: Path, space: Path, mlflow_store: Path, tmp_path: Path
) -> None:
    """`posters`, which the store holds, keeps its artifacts beside that store."""
    before = mlflow_store.read_bytes()
    message = refused(
        "search", space, "--data", data, "--artifacts", tmp_path / "elsewhere", writes=True,
        says=("--artifacts file://", "the experiment 'posters' is there already", "--model"),
    )  # fmt: skip
    assert MlflowClient(f"sqlite:///{mlflow_store}").get_experiment_by_name("posters") is not None
    assert "artifacts in file://" in message and before == mlflow_store.read_bytes()


def test_an_experiment_that_is_there_already(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    url = artifact_url(str(tmp_path / "kept"))
    client = MlflowClient(uri)
    client.create_experiment("it's mine", artifact_location(url, uri, "it's mine"))
    check_artifacts(url, tracking_uri=uri, experiment="it's mine")
    check_artifacts(None, tracking_uri=uri, experiment="it's mine")
    with pytest.raises(InputError, match="is there already"):
        check_artifacts(f"{url}2", tracking_uri=uri, experiment="it's mine")
    client.create_experiment("in S3", "s3://models/x")
    with pytest.raises(InputError, match="bucket cannot be used"):  # Nobody asked for it, but it is
        check_artifacts(None, tracking_uri=uri, experiment="in S3")  # where the models would go.


def test_a_new_experiment_is_placed() -> None:
    for uri in ("sqlite:///x.db", "http://host:5000", "postgresql://host/x"):
        assert artifact_location("s3://b/p", uri, "my posters") == "s3://b/p/my%20posters"
    home = Path("/kept/here")
    assert artifact_location(home, "http://host:5000", "x") is None  # The server's own affair.
    for uri in ("sqlite:///x.db", "postgresql://host/x"):
        assert artifact_location(home, uri, "x") == "file:///kept/here/x"


def test_a_model_in_s3_is_registered_and_predicts(s3_environment: S3Server, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    saved = tmp_path / "saved"
    encoder = build_encoder("ffn", weights="none", input_size=16)
    save_model(
        saved,
        encoder=encoder,
        head=build_head("linear", num_features=encoder.num_features, num_classes=3, seed=1),
        head_spec={"kind": "linear"},
        class_names=["a", "b", "c"],
        pooling="avg",
        input_size=16,
    )
    (tmp_path / "split.json").write_text("[]")
    tracker = Tracker(
        uri, experiment="my posters", artifacts="s3://models/kept", study="s",
        objective="top3_accuracy", floor=0.0,
    )  # fmt: skip
    tracker.start_study({}, [tmp_path / "split.json"])
    tracker.flush()
    info = tracker.ask(
        lambda: log_model(
            saved,
            run_id=tracker.parent_run_id,
            registered_name="my posters",
            input_example_bytes=example_picture(),
            tracking_uri=uri,
        )
    )
    tracker.end_study()
    tracker.flush()
    tracker.close()
    keys = s3_environment.keys("models")
    run = f"kept/my%20posters/{tracker.parent_run_id}"
    assert f"{run}/artifacts/split.json" in keys
    assert any(info.model_id in key and key.endswith("/MLmodel") for key in keys)
    version = MlflowClient(uri).get_model_version_by_alias("my posters", "challenger")
    assert version.source.startswith("s3://models/kept/")
    predictor = load_predictor("models:/my posters@challenger", uri)
    scores = predictor.predict([example_picture()])
    np.testing.assert_allclose(scores, load_model(saved).predict([example_picture()]), atol=1e-6)
    assert not list(tmp_path.rglob("MLmodel")), "nothing was kept on this machine"


def test_a_bucket_that_went_away_is_said_when_predicting(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.create_registered_model("posters")
    client.create_model_version("posters", source="s3://models/there")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="bucket cannot be used"):
        load_predictor("models:/posters/1", uri)
