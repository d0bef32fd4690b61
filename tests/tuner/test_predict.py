"""Finding a logged model and using it. N pictures, C classes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mlflow import MlflowClient
from PIL import Image

from core.data.table import Table
from core.encoding.encoders import build_encoder
from core.errors import InputError
from core.heads import build_head
from core.models.model import load_model, save_model
from tuner.predict import (
    Predictor,
    data_record,
    evaluate_model,
    load_predictor,
    predict_files,
    predict_paths,
)
from tuner.tracking.packaging import ModelVersionInfo, log_model

CLASSES = ("Action", "N/A", "Sci-Fi", "War")


def draw(path: Path, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    path.write_bytes(stream.getvalue())
    return stream.getvalue()


def make_table(folder: Path, *, num_images: int = 40, seed: int = 0, **changes: Any) -> Table:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for row in range(num_images):
        draw(folder / f"{row}.png", 1000 * seed + row)
    values: dict[str, Any] = {
        "name": folder.name,
        "root": folder,
        "ids": tuple(str(row) for row in range(num_images)),
        "paths": tuple(folder / f"{row}.png" for row in range(num_images)),
        "targets_NC": (rng.random((num_images, len(CLASSES))) < 0.4).astype(np.uint8),
        "class_names": CLASSES,
    }
    return Table(**(values | changes))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("data") / "posters")


PARTS: dict[str, npt.NDArray[np.int64]] = {
    "train": np.arange(0, 20),
    "validation": np.arange(20, 28),
    "test": np.arange(28, 39),
}
"""Row 39 is in no part."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, table: Table) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    encoder = build_encoder("ffn", weights="none")
    save_model(
        folder,
        encoder=encoder,
        head=build_head("linear", num_features=encoder.num_features, num_classes=4, seed=1),
        head_spec={"kind": "linear"},
        class_names=CLASSES,
        pooling="avg",
        thresholds=[0.5, 0.5, 0.2, 0.9],
        input_size=48,
        metadata={"data": data_record(table, PARTS)},
    )
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def logged(
    address: str, model_dir: Path, table: Table, tmp_path_factory: pytest.TempPathFactory
) -> ModelVersionInfo:
    client = MlflowClient(tracking_uri=address)
    experiment = client.create_experiment("e", str(tmp_path_factory.mktemp("artifacts")))
    run = client.create_run(experiment)
    return log_model(
        model_dir,
        run_id=run.info.run_id,
        registered_name="posters",
        input_example_bytes=table.paths[0].read_bytes(),
        tracking_uri=address,
    )


@pytest.fixture(scope="module")
def local(model_dir: Path) -> Predictor:
    return load_predictor(str(model_dir))


@pytest.mark.parametrize("form", ["alias", "version", "model", "run", "run name", "folder"])
def test_every_address_leads_to_the_same_model(
    form: str, logged: ModelVersionInfo, address: str, model_dir: Path, table: Table
) -> None:
    client = MlflowClient(tracking_uri=address)
    model = client.get_logged_model(logged.model_id)
    uri = {
        "alias": "models:/posters@challenger",
        "version": logged.uri,
        "model": f"models:/{logged.model_id}",
        "run": f"runs:/{model.source_run_id}",
        "run name": f"runs:/{model.source_run_id}/classifier",
        "folder": model.artifact_location,
    }[form]
    predictor = load_predictor(uri, address)
    assert predictor.uri == uri
    assert predictor.class_names == CLASSES
    assert predictor.thresholds == (0.5, 0.5, 0.2, 0.9)
    pictures = [path.read_bytes() for path in table.paths[:3]]
    expected = load_model(model_dir).predict(pictures)
    np.testing.assert_allclose(predictor.predict(pictures), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/posters@champion", r"no such model\n.*models:/posters@challenger"),
        ("models:/posters/7", r"no such model\n.*models:/posters@challenger"),
        ("models:/other/1", r"no such model\n.*models:/posters@challenger"),
        ("models:/m-0000", "no such model"),
        ("models:/posters", r"not the address of a model\n.*models:/NAME@ALIAS.*posters@chall"),
        ("runs:/0123456789abcdef0123456789abcdef", "no such model"),
        ("nowhere/at/all", r"no such folder\n  valid: models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_model_lists_what_exists(
    uri: str, message: str, logged: ModelVersionInfo, address: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_predictor(uri, address)
    assert caught.value.where == uri


def test_a_run_without_a_model_says_so(address: str, logged: ModelVersionInfo) -> None:
    run = MlflowClient(tracking_uri=address).create_run("0")
    with pytest.raises(InputError, match="the run has no logged model"):
        load_predictor(f"runs:/{run.info.run_id}", address)


def test_a_store_that_is_not_there_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no MLflow store"):
        load_predictor("models:/a@b", f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model in this folder"):
        load_predictor(str(tmp_path))


def test_files_are_predicted_best_class_first(local: Predictor, table: Table) -> None:
    files = [table.paths[3], table.paths[1]]
    scores_NC = local.predict([path.read_bytes() for path in files])
    predictions = predict_files(local, files)
    assert [p.path for p in predictions] == files
    for prediction, scores_C in zip(predictions, scores_NC, strict=True):
        plain = dict(zip(CLASSES, scores_C.tolist(), strict=True))
        assert dict(prediction.probabilities) == plain
        values = list(prediction.probabilities.values())
        assert values == sorted(values, reverse=True)
        limits = dict(zip(CLASSES, [0.5, 0.5, 0.2, 0.9], strict=True))
        assert prediction.predicted is not None
        assert set(prediction.predicted) == {c for c in CLASSES if plain[c] >= limits[c]}
        answer = json.loads(json.dumps(prediction.to_dict()))
        assert answer["image"] == str(prediction.path)
        assert answer["top3"] == sorted(CLASSES, key=lambda c: -plain[c])[:3]
        assert answer["probabilities"] == plain


def test_without_thresholds_nothing_is_called_predicted(local: Predictor, table: Table) -> None:
    bare = Predictor(
        uri="x", class_names=CLASSES, thresholds=None, metadata={}, predict=local.predict
    )
    (prediction,) = predict_files(bare, [table.paths[0]])
    assert prediction.predicted is None
    assert prediction.to_dict()["predicted"] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "the picture is missing"),
        (lambda path: path.mkdir(), r"is a folder\n  name files"),
        (lambda path: path.write_bytes(b"hello, world, hello"), "this is not a picture"),
        (lambda path: path.write_bytes(draw(path, 1)[:90]), "the picture is damaged"),
    ],
)
def test_a_bad_file_is_named(
    local: Predictor, table: Table, tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    bad = tmp_path / "bad.png"
    make(bad)
    with pytest.raises(InputError, match=message) as caught:
        predict_files(local, [table.paths[0], bad])
    assert caught.value.where == str(bad)


@pytest.mark.parametrize("source", ["saved", "mlflow"])
def test_a_bad_picture_among_many_is_named_by_its_file(
    source: str,
    local: Predictor,
    logged: ModelVersionInfo,
    address: str,
    table: Table,
    tmp_path: Path,
) -> None:
    predictor = local if source == "saved" else load_predictor(logged.uri, address)
    bad = tmp_path / "bad.png"
    bad.write_bytes(draw(bad, 1)[:90])
    with pytest.raises(InputError, match="the picture is damaged") as caught:
        predict_paths(predictor, [*table.paths[:5], bad])
    assert caught.value.where == str(bad)


def test_chunks_change_nothing_and_progress_is_told(
    local: Predictor, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_NC = predict_paths(local, table.paths)
    monkeypatch.setattr("tuner.predict.CHUNK_ROWS", 16)
    told: list[tuple[int, int]] = []
    parts_NC = predict_paths(local, table.paths, progress=lambda *step: told.append(step))
    np.testing.assert_allclose(parts_NC, whole_NC, atol=1e-6)
    assert told == [(16, 40), (32, 40), (40, 40)]


def top3_by_hand(scores_NC: Any, targets_NC: Any) -> float:
    matched = sum(
        int(t[list(np.argsort(-s)[:3])].sum()) for s, t in zip(scores_NC, targets_NC, strict=True)
    )
    return matched / int(targets_NC.sum())


def test_on_its_own_data_a_model_is_judged_on_its_test_split(
    local: Predictor, table: Table
) -> None:
    result = evaluate_model(local, table)
    rows = PARTS["test"]
    assert (result.split, result.same_data) == ("test", True)
    assert result.evaluation.num_images == 11
    scores_NC = local.predict([table.paths[row].read_bytes() for row in rows])
    expected = top3_by_hand(scores_NC, table.targets_NC[rows])
    assert result.evaluation.top3_accuracy.value == pytest.approx(expected)
    # The prior baseline by hand: the three classes commonest in training, not in test.
    order = np.argsort(-table.targets_NC[PARTS["train"]].sum(0), kind="stable")[:3]
    prior = table.targets_NC[rows][:, order].sum() / table.targets_NC[rows].sum()
    assert result.evaluation.prior_baseline == pytest.approx(float(prior))
    answer = json.loads(json.dumps(result.to_dict()))
    assert answer["top3_accuracy"] == pytest.approx(expected)
    assert answer["data"] == str(table.root)
    assert answer["learnt_nothing"] is True


@pytest.mark.parametrize(("split", "count"), [("train", 20), ("validation", 8), ("all", 40)])
def test_a_named_split_is_taken(local: Predictor, table: Table, split: str, count: int) -> None:
    result = evaluate_model(local, table, split=split)
    assert (result.split, result.evaluation.num_images) == (split, count)


def test_a_moved_table_is_still_the_same_data(
    local: Predictor, table: Table, tmp_path: Path
) -> None:
    moved = make_table(tmp_path / "moved")
    assert moved.paths != table.paths
    assert evaluate_model(local, moved).same_data


def test_other_data_is_judged_whole_or_by_its_own_split(local: Predictor, tmp_path: Path) -> None:
    other = make_table(tmp_path / "other", num_images=12, seed=1)
    result = evaluate_model(local, other)
    assert (result.split, result.same_data, result.evaluation.num_images) == ("all", False, 12)
    with pytest.raises(InputError, match=r"no test split.*\n  take --split all"):
        evaluate_model(local, other, split="test")
    given = ("train",) * 7 + ("test",) * 5
    split_table = make_table(tmp_path / "split", num_images=12, seed=1, given_split=given)
    result = evaluate_model(local, split_table)
    assert (result.split, result.evaluation.num_images) == ("test", 5)
    with pytest.raises(InputError, match="the validation split is empty"):
        evaluate_model(local, split_table, split="validation")
    with pytest.raises(InputError, match="unknown split 'tset'"):
        evaluate_model(local, split_table, split="tset")


def test_the_order_of_classes_in_the_table_does_not_matter(
    local: Predictor, table: Table, tmp_path: Path
) -> None:
    backwards = make_table(tmp_path / "backwards")
    backwards = Table(
        name="x",
        root=backwards.root,
        ids=backwards.ids,
        paths=backwards.paths,
        targets_NC=np.ascontiguousarray(backwards.targets_NC[:, ::-1]),
        class_names=CLASSES[::-1],
    )
    first = evaluate_model(local, table, split="all").evaluation
    second = evaluate_model(local, backwards, split="all").evaluation
    assert second == first


def test_other_classes_are_refused(local: Predictor, tmp_path: Path) -> None:
    other = make_table(tmp_path / "other", class_names=("Action", "N/A", "Sci-Fi", "Western"))
    with pytest.raises(InputError, match=r"\['War', 'Western'\] are known to one of them only"):
        evaluate_model(local, other)


def test_a_model_without_a_record_is_judged_against_the_answers_own_prior(
    local: Predictor, table: Table
) -> None:
    bare = Predictor(
        uri="x", class_names=CLASSES, thresholds=None, metadata={}, predict=local.predict
    )
    result = evaluate_model(bare, table)
    assert (result.split, result.same_data) == ("all", False)
    counts_C = np.sort(table.targets_NC.sum(0))[::-1]
    assert result.evaluation.prior_baseline == pytest.approx(counts_C[:3].sum() / counts_C.sum())


def test_the_record_of_the_data_is_small_json(table: Table) -> None:
    record = json.loads(json.dumps(data_record(table, PARTS)))
    assert record["parts"] == "r" * 20 + "v" * 8 + "t" * 11 + "-"
    assert record["train_counts"] == table.targets_NC[:20].sum(0).tolist()
    assert record["num_train"] == 20
    assert record["fingerprint"] == table.fingerprint()
