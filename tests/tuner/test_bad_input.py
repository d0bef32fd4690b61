"""Everything a person can hand in wrong, through the real command: exit code 2, a message that says
where it is, what is wrong and what would be right, no traceback, and nothing written."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tuner.addresses

Run = Callable[..., Any]


@pytest.fixture
def refused(tuner: Run, home: Path) -> Run:
    """Runs a command that must be refused with a message that holds these texts, in this order."""

    def check(*args: Any, says: tuple[str, ...], writes: bool = False) -> str:
        ended = tuner(*args)
        assert ended.code == 2, (ended.code, ended.out, ended.err)
        assert "Traceback" not in ended.err
        assert ended.err.startswith(("error: ", "Usage: "))
        assert re.search(".*".join(map(re.escape, says)), ended.err, re.DOTALL), ended.err
        if not writes:
            files = [path for path in home.rglob("*") if path.is_file()]
            assert not files, "something was written"
            assert not list((home / "studies").glob("*")), "the study's name is taken"
        return str(ended.err)

    return check


# ---- tables ---------------------------------------------------------------------------------


def edit_csv(data: Path, change: Callable[[list[list[str]]], None]) -> None:
    path = data / "train.csv"
    cells = [line.split(",") for line in path.read_text().splitlines()]
    change(cells)
    path.write_text("\n".join(",".join(line) for line in cells) + "\n")


def set_cell(row: int, column: int, text: str) -> Callable[[Path], None]:
    """Row as a spreadsheet counts: the header is 1."""

    def change(cells: list[list[str]]) -> None:
        cells[row - 1][column] = text

    return lambda data: edit_csv(data, change)


def clear_class(column: int, rows: range) -> Callable[[Path], None]:
    def change(cells: list[list[str]]) -> None:
        for row in rows:
            cells[row - 1][column] = "0"

    return lambda data: edit_csv(data, change)


def give_split(data: Path) -> None:
    """Rows 2 to 9 are the test part, and none of them shows War."""

    def change(cells: list[list[str]]) -> None:
        for row, line in enumerate(cells, 1):
            is_test = 2 <= row <= 9
            line.append("split" if row == 1 else "test" if is_test else "train")
            if is_test:
                line[4] = "0"

    edit_csv(data, change)


def lead_out_by_link(data: Path) -> None:
    (data.parent / "secret.png").write_bytes((data / "3.png").read_bytes())
    (data / "3.png").unlink()
    (data / "3.png").symlink_to(data.parent / "secret.png")


def keep_columns(number: int) -> Callable[[Path], None]:
    def change(cells: list[list[str]]) -> None:
        cells[:] = [line[:number] for line in cells]

    return lambda data: edit_csv(data, change)


def nothing(data: Path) -> None:
    """The table is as it should be: a flag is wrong."""


TABLES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], tuple[str, ...]]] = {
    "no CSV": (
        lambda data: (data / "train.csv").unlink(),
        (),
        ("posters: no CSV file", "name it with --csv"),
    ),
    "no such CSV": (nothing, ("--csv", "films.csv"), ("films.csv: there is no such CSV file",)),
    "empty CSV": (lambda data: (data / "train.csv").write_text(""), (), ("train.csv", "empty")),
    "only a header": (
        lambda data: (data / "train.csv").write_text("Id,Action,Drama\n"),
        (),
        ("train.csv", "holds no rows"),
    ),
    "not UTF-8": (
        lambda data: (data / "train.csv").write_bytes("Id,Dramé\n1,0\n".encode("latin-1")),
        (),
        ("train.csv", "not UTF-8", "save it as CSV UTF-8"),
    ),
    "id column": (
        nothing,
        ("--id-column", "imdb"),
        ("train.csv", "no column 'imdb'", "columns: Id, Action, Drama, N/A, War"),
    ),
    "label column": (nothing, ("--label-column", "g"), ("no column 'g'", "columns: Id, Action")),
    "split column": (nothing, ("--split-column", "s"), ("no column 's'", "columns: Id, Action")),
    "no labels": (keep_columns(1), (), ("train.csv", "no column holds labels", "--label-column")),
    "not 0/1": (
        set_cell(5, 2, "2"),
        (),
        ("train.csv, column 'Drama'", "row 5 holds '2'", "neither 0 nor 1", "0 or 1 in every row"),
    ),
    "ids with different labels": (
        set_cell(5, 0, "0"),
        (),
        ("train.csv", "repeated with different labels: 0 (rows 2, 5)", "keep one row of each"),
    ),
    "fewer rows than classes": (
        lambda data: edit_csv(data, lambda cells: cells.__delitem__(slice(4, None))),
        (),
        ("train.csv", "3 rows are fewer than the 4 classes"),
    ),
    "fewer than 4 classes": (
        keep_columns(4),
        (),
        ("posters", "3 classes are too few for top3_accuracy", "it takes 4 classes"),
    ),
    "leaves the folder": (
        set_cell(3, 0, "../secret.png"),
        (),
        ("train.csv", "row 3 holds '../secret.png', which leaves the folder", "--images"),
    ),
    "leaves the folder by a link": (
        lead_out_by_link,
        (),
        ("train.csv", "row 5 holds '3', which leaves the folder"),
    ),
    "class without picture": (
        clear_class(4, range(2, 26)),
        (),
        ("posters", "cannot be split: War (0)", "add pictures of them, or take these classes out"),
    ),
    "class missing in a given split": (
        give_split,
        (),
        ("posters", "class 'War' has no picture in test", "move one there"),
    ),
    "no picture folder": (nothing, ("--images", "covers"), ("covers", "no such folder")),
}


@pytest.mark.parametrize("case", TABLES)
def test_table(case: str, refused: Run, data: Path, space: Path) -> None:
    arrange, flags, says = TABLES[case]
    arrange(data)
    refused("search", space, "--data", data, *flags, says=says)


def test_no_data_folder(refused: Run, tmp_path: Path, space: Path) -> None:
    refused("search", space, "--data", tmp_path / "nowhere", says=("nowhere", "no such folder"))
    refused("data", "check", "--data", tmp_path / "nowhere", says=("nowhere", "no such folder"))
    refused("search", space, says=("Missing option '--data'",))


# ---- pictures -------------------------------------------------------------------------------


def claim_size(width: int, height: int) -> bytes:
    """A PNG that is larger than memory by its header, and 100 bytes on disk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "the picture is missing"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged"),
    "not an image": (lambda path: path.write_text("<html>404</html>"), "this is not a picture"),
    "bomb": (
        lambda path: path.write_bytes(claim_size(60_000, 60_000)),
        "60000 x 60000 pixels are more than the limit of 50,000,000",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_picture_is_refused_or_skipped(
    case: str, refused: Run, tuner: Run, data: Path, space: Path
) -> None:
    damage, reason = DAMAGE[case]
    damage(data / "7.png")
    says = ("posters: 1 of 24 pictures cannot be used", f"{data}/7.", reason, "--skip-bad-images")
    refused("search", space, "--data", data, says=says)
    refused("data", "check", "--data", data, says=says)
    ended = tuner("data", "check", "--data", data, "--skip-bad-images", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["num_images"] == 23
    assert [Path(entry["path"]).stem for entry in report["left_out"]] == ["7"]
    assert reason in report["left_out"][0]["reason"]


def test_skipped_pictures_are_counted_and_listed(tuner: Run, data: Path, space: Path) -> None:
    bad = [3, 8, 20]
    for number in bad:
        (data / f"{number}.png").write_text("damaged")
    ended = tuner("search", space, "--data", data, "--skip-bad-images", "--dry-run")
    assert ended.code == 0, ended.err
    flat = ended.out.replace("\n", "")
    assert "3 damaged pictures are left out" in flat
    for number in range(24):
        assert (f"posters/{number}.png: this is not a picture" in flat) == (number in bad)
    assert "21 pictures, 4 classes" in flat


def test_many_damaged_pictures_are_summed_up(refused: Run, data: Path, space: Path) -> None:
    for number in range(22):
        (data / f"{number}.png").write_text("damaged")
    refused(
        "search", space, "--data", data, says=("22 of 24 pictures cannot be used", "and 17 more")
    )
    refused(
        "search", space, "--data", data, "--skip-bad-images",
        says=("2 usable pictures are left for 4 classes", "at least as many pictures as classes"),
    )  # fmt: skip


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_unusual_pictures_are_welcome(tuner: Run, data: Path) -> None:
    """CMYK, palette, transparent, 16-bit and animated pictures are read, not refused."""
    noise = Image.fromarray(np.random.default_rng(99).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    deep = Image.fromarray(np.random.default_rng(98).integers(0, 65536, (24, 16), dtype=np.uint16))
    frames = [noise.rotate(90).convert("P"), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    kinds = {
        "0.jpg": encoded(noise.convert("CMYK"), "JPEG"),
        "1.png": encoded(noise.rotate(180).convert("P"), "PNG"),
        "2.png": encoded(noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM).convert("RGBA"), "PNG"),
        "3.png": encoded(deep, "PNG"),
        "4.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for name, content in kinds.items():
        (data / name).with_suffix(".png").unlink()
        (data / name).write_bytes(content)
    ended = tuner("data", "check", "--data", data, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["num_images"] == 24
    assert json.loads(ended.out)["left_out"] == []


# ---- spaces ---------------------------------------------------------------------------------

SPACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "backbone": ("backbone: resnet51", ("parameters.backbone", "'resnet51'", "did you mean")),
    "loss": ("backbone: ffn\n  loss: bcee", ("line 3", "loss", "'bcee'", "valid: asymmetric")),
    "optimizer": ("backbone: ffn\n  optimizer: adamm", ("'adamm'", "valid: adam, adamw")),
    "lr 0": ("backbone: ffn\n  lr: 0", ("parameters.lr", "lr > 0 must hold")),
    "empty choice": ("backbone: ffn\n  head: []", ("parameters.head", "nothing to choose from")),
    "inverted range": (
        "backbone: ffn\n  lr: {low: 1, high: 0.1}",
        ("parameters.lr.low", "low <= high must hold"),
    ),
    "unknown key": ("backbone: ffn\n  learning_rate: 1", ("'learning_rate'", "valid: ")),
    "condition on nothing": (
        "backbone: ffn\n  momentum: {low: 0.1, high: 0.9, when: {optimizer: sgd}}",
        ("momentum.when.optimizer", "a condition on optimizer, which the space does not have"),
    ),
    "not YAML": ("{backbone", ("line 3: it is not valid YAML",)),
}


@pytest.mark.parametrize("case", SPACES)
def test_space(case: str, refused: Run, data: Path, tmp_path: Path) -> None:
    text, says = SPACES[case]
    path = tmp_path / "bad.yaml"
    path.write_text(f"parameters:\n  {text}\n")
    refused("search", path, "--data", data, says=("bad.yaml", *says))
    refused("space", "check", path, says=("bad.yaml", *says))


@pytest.mark.parametrize("command", [("search",), ("space", "show"), ("space", "check")])
def test_no_such_space(command: tuple[str, ...], refused: Run, data: Path) -> None:
    rest = ("--data", data) if command == ("search",) else ()
    refused(*command, "prob", *rest, says=("prob", "demo, finetune, probe, seed"))


# ---- flags ----------------------------------------------------------------------------------

FLAGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--trials", "0"), ("--trials", "at least one trial is needed, but got 0")),
    (("--trials", "many"), ("'--trials'", "'many' is not a valid integer")),
    (("--hours", "-1"), ("--hours", "must be positive, but got -1")),
    (("--hours", "nan"), ("--hours", "must be positive, but got nan")),
    (("--folds", "1"), ("--folds", "at least 2 folds are needed, but got 1", "one part")),
    (("--folds", "0"), ("--folds", "at least 2 folds are needed, but got 0", "one part")),
    (("--folds", "20"), ("posters", "pictures in fold", "has a label", "fewer folds")),
    (("--seed", "-1"), ("'--seed'", "-1 is not in the range")),
    (("--study", "../up"), ("--study", "'../up' cannot name a study", "letters, digits")),
    (("--model", "a/b"), ("--model", "'a/b' cannot name a registered model", "without / and :")),
    (("--weights", "nowhere"), ("--weights nowhere", "no such folder", "NAME.pth", "`none`")),
    (("--frist",), ("No such option", "--frist")),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "says"), FLAGS, ids=[" ".join(f) for f, _ in FLAGS])
def test_flag(
    flags: tuple[str, ...], says: tuple[str, ...], refused: Run, data: Path, space: Path
) -> None:
    refused("search", space, "--data", data, *flags, says=says)
    refused("search", space, "--data", data, *flags, "--dry-run", says=says)


def test_folds_of_fine_tuning(refused: Run, data: Path) -> None:
    refused(
        "search", "finetune", "--data", data, "--folds", "3",
        says=("--folds", "folds are for probes", "leave it out"),
    )  # fmt: skip


# ---- names and folders in use -----------------------------------------------------------------


def test_study_name_in_use(refused: Run, tuner: Run, home: Path, data: Path, space: Path) -> None:
    kept = home / "studies" / "mine" / "study.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    refused(
        "search", space, "--data", data, "--study", "mine",
        says=("--study", "a study named 'mine' exists", "tuner resume mine"), writes=True,
    )  # fmt: skip
    assert kept.read_text() == "precious"
    ended = tuner("search", space, "--data", data, "--study", "other", "--dry-run")
    assert ended.code == 0, ended.err


def test_study_name_in_use_in_mlflow(
    refused: Run, tuner: Run, mlflow_store: Path, data: Path, space: Path
) -> None:
    """Two homes that share a server must not write into each other's runs."""
    refused(
        "search", space, "--data", data, "--study", "tiny-1",
        says=("--study", "'tiny-1' is in this MLflow or storage already", "another name"),
        writes=True,
    )  # fmt: skip
    ended = tuner("search", space, "--data", data, "--dry-run")
    assert re.search(r"study +tiny-2", ended.out), "a default name is one that is free"


def test_study_name_in_use_in_storage(
    refused: Run, tuner: Run, tmp_path: Path, data: Path, space: Path
) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(storage=storage, study_name="tiny-1")
    common = ("search", space, "--data", data, "--storage", storage)
    refused(*common, "--study", "tiny-1", says=("--study", "'tiny-1' is in this MLflow or storage"))
    assert re.search(r"study +tiny-2", tuner(*common, "--dry-run").out)


def test_unwritable_home(
    tuner: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, space: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        monkeypatch.setenv("TUNER_HOME", str(place))
        ended = tuner("search", space, "--data", data)
        assert ended.code == 2
        assert re.match(f"error: {place}: cannot be written .*\n.*TUNER_HOME\n", ended.err)
    assert (tmp_path / "file").read_text() == "in the way"


def test_unwritable_folder_of_posters(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("data", "synth", folder, says=(f"{folder}: ", "folder"))


# ---- weights --------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No download works and none has been made: the way out is a port that refuses."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.mark.usefixtures("offline")
def test_weights_not_at_hand(refused: Run, data: Path, tmp_path: Path) -> None:
    space = tmp_path / "cnn.yaml"
    space.write_text("parameters: {backbone: [ffn, squeezenet1_1]}\n")
    says = (
        "squeezenet1_1: no pretrained weights at hand, and the download failed",
        "fetch https://download.pytorch.org/models/squeezenet1_1",
        "--weights none",
    )
    refused("search", space, "--data", data, says=says)
    refused("search", space, "--data", data, "--dry-run", says=says)
    (tmp_path / "weights").mkdir()
    refused("search", space, "--data", data, "--weights", tmp_path / "weights", says=says)


def test_weights_that_do_not_fit(refused: Run, data: Path, tmp_path: Path) -> None:
    space = tmp_path / "cnn.yaml"
    space.write_text("parameters: {backbone: squeezenet1_1}\n")
    common = ("search", space, "--data", data, "--weights", tmp_path)
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "squeezenet1_1.pth")
    refused(*common, says=("squeezenet1_1.pth: the weights do not fit", "a state dict of squeeze"))
    (tmp_path / "squeezenet1_1.pth").write_bytes(b"<html>404</html>")
    refused(*common, says=("squeezenet1_1.pth: cannot be read as weights", "state dict"))


def test_onnx_weights(refused: Run, data: Path, tmp_path: Path) -> None:
    space = tmp_path / "onnx.yaml"
    space.write_text("parameters: {backbone: onnx/mine.onnx}\n")
    refused("search", space, "--data", data, "--weights", tmp_path, says=("mine.onnx", "--weights"))
    refused(
        "search", space, "--data", data, "--weights", "none",
        says=("onnx/mine.onnx holds its weights itself", "leave ONNX backbones out"),
    )  # fmt: skip


# ---- addresses ------------------------------------------------------------------------------


@pytest.fixture
def deaf_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that takes connections and never says a word. Patience is cut to a second."""
    assert tuner.addresses.ANSWER_SECONDS <= 8, "said within 15 s, with the time to start"
    monkeypatch.setattr(tuner.addresses, "ANSWER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


DATABASE = "postgresql://me:secret@127.0.0.1:{port}/optuna"
SERVERS = [
    ("--tracking-uri", "http://127.0.0.1:{port}", "no MLflow server answers", "mlflow server"),
    ("--tracking-uri", DATABASE, "the database cannot be opened", "postgresql://USER"),
    ("--storage", DATABASE, "the database cannot be opened", "postgresql://USER"),
    ("--address", "127.0.0.1:{port}", "no Ray answers there", "ray start --head"),
    ("--address", "ray://127.0.0.1:{port}", "no Ray answers there", "ray start --head"),
]


@pytest.mark.parametrize(("flag", "address", "problem", "hint"), SERVERS)
def test_nobody_answers(
    flag: str, address: str, problem: str, hint: str,
    refused: Run, data: Path, space: Path, deaf_port: int,
) -> None:  # fmt: skip
    for port, reason in {1: "refused", deaf_port: "no answer within 1 s"}.items():
        where = f"{flag} {address.format(port=port)}".replace("secret", "***")
        started = time.monotonic()
        message = refused(
            "search", space, "--data", data, flag, address.format(port=port),
            says=(where, problem, reason, hint),
        )  # fmt: skip
        assert time.monotonic() - started < 15
        assert "secret" not in message


def test_something_else_answers(
    refused: Run, monkeypatch: pytest.MonkeyPatch, data: Path, space: Path
) -> None:
    """A port of another service: it greets in its own way and hangs up."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        threading.Thread(target=greet, daemon=True).start()
        port = server.getsockname()[1]
        for flag, address, problem, hint in SERVERS:
            refused(
                "search", space, "--data", data, flag, address.format(port=port),
                says=(flag, problem, hint),
            )  # fmt: skip
        server.shutdown(socket.SHUT_RDWR)


ADDRESSES: list[tuple[str, str, tuple[str, ...]]] = [
    ("--tracking-uri", "somewhere", ("no address of MLflow", "http://HOST:PORT")),
    ("--tracking-uri", "sqlite:////nowhere/mlflow.db", ("no folder /nowhere", "make it first")),
    ("--tracking-uri", "sqlite://", ("in memory", "sqlite:///FILE")),
    ("--tracking-uri", "gopher://x", ("cannot be opened", "postgresql://USER")),
    ("--storage", "somewhere", ("cannot be opened", "sqlite:///FILE")),
    ("--storage", "sqlite:////nowhere/optuna.db", ("no folder /nowhere", "make it first")),
    ("--storage", "sqlite:///:memory:", ("in memory", "sqlite:///FILE")),
    ("--address", "somewhere", ("no address of a cluster", "HOST:PORT")),
    ("--address", "127.0.0.1:x", ("no address of a cluster", "HOST:PORT")),
    ("--address", "127.0.0.1:99999", ("no Ray answers", "ray start")),
]


@pytest.mark.parametrize(("flag", "address", "says"), ADDRESSES)
def test_address(
    flag: str, address: str, says: tuple[str, ...], refused: Run, data: Path, space: Path
) -> None:
    where = f"{flag} {address}"
    refused("search", space, "--data", data, flag, address, says=(where, *says))


def test_database_without_a_driver(
    refused: Run, monkeypatch: pytest.MonkeyPatch, data: Path, space: Path
) -> None:
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.setattr(tuner.addresses, "find_spec", lambda _: None)
    refused(
        "search", space, "--data", data, "--storage", "postgresql://me@127.0.0.1:1/optuna",
        says=("--storage postgresql://me@", "no driver for this", "poster-tuner[postgres]"),
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--tracking-uri", "--storage"])
def test_file_that_is_no_database(
    flag: str, refused: Run, data: Path, space: Path, tmp_path: Path
) -> None:
    file = tmp_path / "notes.db"
    file.write_text("these are notes, and no database " * 10)
    refused("search", space, "--data", data, flag, f"sqlite:///{file}", says=("notes.db", "not a"))
    assert file.read_text().startswith("these are notes")


def test_auto_without_a_cluster(
    refused: Run, monkeypatch: pytest.MonkeyPatch, data: Path, space: Path
) -> None:
    """Ray's look-up is replaced: it would find, and join, whatever runs on this machine."""
    from ray._private import services

    def none_found(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address", none_found)
    common = ("search", space, "--data", data, "--address", "auto")
    refused(*common, says=("--address auto", "no Ray runs on this machine", "ray start --head"))
    # A cluster that was killed leaves its address behind.
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _: "127.0.0.1:1")
    refused(*common, says=("--address 127.0.0.1:1", "no Ray answers there"))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_model_of_a_dead_server(command: str, refused: Run, data: Path) -> None:
    rest = (data / "0.png",) if command == "predict" else ("--data", data)
    refused(
        command, "models:/posters/1", *rest, "--tracking-uri", "http://127.0.0.1:1",
        says=("--tracking-uri http://127.0.0.1:1", "no MLflow server answers"),
    )  # fmt: skip


# ---- what only shows later --------------------------------------------------------------------


def test_failure_before_the_first_trial_leaves_nothing(
    refused: Run, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path, home: Path,
    data: Path, space: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """A cluster may still refuse: its workers lack the weights, or it has no cores."""
    import optuna
    from mlflow import MlflowClient

    import tuner.search
    from core.errors import InputError

    def refuse(address: str) -> Any:
        raise InputError("no machine has a core to spare", where="--address here", hint="add one")

    monkeypatch.setattr(tuner.search, "cluster", refuse)
    storage = f"sqlite:///{tmp_path}/optuna.db"
    refused(
        "search", space, "--data", data, "--study", "mine", "--storage", storage,
        says=("--address here", "no machine has a core to spare", "add one"), writes=True,
    )  # fmt: skip
    assert not list((home / "studies").iterdir())
    assert optuna.get_all_study_names(storage) == []
    client = MlflowClient(tracking_uri=f"sqlite:///{mlflow_store}")
    experiment = client.get_experiment_by_name("posters")
    assert experiment is not None
    names = [run.info.run_name for run in client.search_runs([experiment.experiment_id])]
    assert names == ["tiny-1"], "only the run that was there before"
