"""The command `tuner`: quick to start, plain in what it prints, and honest in how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tuner.spaces.space import shipped_spaces

from ..processes import wait_for

Run = Callable[..., Any]
HEAVY = {"torch", "torchvision", "ray", "mlflow", "optuna", "pandas", "numpy", "PIL", "rich"}
RUN = "import sys; sys.argv[0] = 'tuner'; from tuner.cli.main import main; main()"


# ---- starting -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--help"], ["search", "--help"], ["data", "check", "-h"]])
def test_help_loads_nothing_heavy(flags: list[str]) -> None:
    code = (
        "import sys; sys.argv[0] = 'tuner'\n"
        "from tuner.cli.main import main\n"
        "main()\n"
        f"print(*({HEAVY!r} & set(sys.modules)), file=sys.stderr, end='')"
    )
    seconds = []
    for _ in range(3 if flags == ["--help"] else 1):
        started = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-c", code, *flags],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
        assert ended.stdout.startswith("Usage: tuner") and not ended.stderr
    print(f"median {statistics.median(seconds):.2f} s")  # Not asserted: CI machines are busy.


def test_bare_command_shows_what_there_is(tuner: Run) -> None:
    ended = tuner()
    text = ended.out + ended.err
    for command in ("search", "resume", "trials", "data", "space", "predict", "evaluate", "ui"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE), command


def test_version(tuner: Run) -> None:
    assert re.search(r"version \d+\.\d+\.\d+", tuner("--version").out)


@pytest.mark.parametrize("args", [["serach"], ["data", "chek"], ["search"], ["ui", "--port", "0"]])
def test_usage_errors(args: list[str], tuner: Run, home: Path) -> None:
    ended = tuner(*args)
    assert ended.code == 2
    assert ended.err.startswith("Usage: ") and "Traceback" not in ended.err
    assert not home.exists()


# ---- spaces ---------------------------------------------------------------------------------


def test_space_list_show_and_check(tuner: Run, home: Path) -> None:
    listed = tuner("space", "list")
    assert listed.code == 0
    names = set(shipped_spaces())
    assert names == {"demo", "finetune", "probe", "seed", "two_stage", "two_stage_small"}
    assert {line.split()[0] for line in listed.out.splitlines() if line.strip()} >= names
    for name in names:
        shown = tuner("space", "show", name)
        assert shown.out == shipped_spaces()[name].read_text(), "byte for byte: it can be piped"
        checked = tuner("space", "check", name)
        assert re.match(rf"{name}: \d+ parameters, .* configurations, \d+ trials by ", checked.out)
    assert not home.exists()


def test_shown_space_is_a_start_of_ones_own(tuner: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(tuner("space", "show", "demo").out)
    assert tuner("space", "check", mine).out.startswith("mine: ")
    assert tuner("space", "show", mine).out == mine.read_text()


# ---- data -----------------------------------------------------------------------------------


def test_data_check_prints_json_alone(tuner: Run, data: Path) -> None:
    (data / "7.png").write_text("damaged")
    ended = tuner("data", "check", "--data", data, "--skip-bad-images", "--json")
    assert ended.code == 0
    report = json.loads(ended.out)
    assert report["num_images"] == 23 and report["num_classes"] == 4
    # Class N/A is a class, and not a missing value.
    assert report["label_counts"] == {"Action": 11, "Drama": 11, "N/A": 11, "War": 8}
    assert "1 damaged pictures are left out" in ended.err, "for people, beside the JSON"


def test_data_check_for_people(tuner: Run, data: Path) -> None:
    ended = tuner("data", "check", "--data", data)
    assert ended.code == 0
    assert re.search(r"pictures +24 *\n", ended.out)
    assert re.search(r"N/A .* 12 .* 50.0 %", ended.out)


def test_synth_draws_what_check_reads(tuner: Run, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    ended = tuner("data", "synth", folder, "--images", "120")
    assert ended.code == 0 and str(folder) in ended.out
    assert len(list((folder / "Images").iterdir())) == 120
    before = (folder / "train.csv").read_bytes()
    again = tuner("data", "synth", folder, "--images", "120")
    assert again.code == 2
    assert re.search(f"{folder}: the folder is not empty.*\n.*new folder", again.err)
    assert (folder / "train.csv").read_bytes() == before
    checked = tuner("data", "check", "--data", folder, "--json")
    assert json.loads(checked.out)["num_classes"] == 25


def test_synth_of_too_few(tuner: Run, tmp_path: Path) -> None:
    ended = tuner("data", "synth", tmp_path / "few", "--images", "3")
    assert ended.code == 2 and re.search(r"120|at least", ended.err)
    assert not (tmp_path / "few").exists()


def test_fetch_of_nothing(tuner: Run, tmp_path: Path) -> None:
    ended = tuner("data", "fetch", "posters", tmp_path / "p", "--from", tmp_path / "mirror.zip")
    assert ended.code == 2 and "mirror.zip" in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "p").exists()


# ---- search ---------------------------------------------------------------------------------


def test_dry_run_writes_nothing(tuner: Run, home: Path, data: Path, space: Path) -> None:
    ended = tuner("search", space, "--data", data, "--trials", "7", "--dry-run")
    assert ended.code == 0, ended.err
    for line in (r"study +tiny-1", r"table +24 pictures, 4 classes", r"trials +7 of 2 conf"):
        assert re.search(line, ended.out), (line, ended.out)
    assert "nothing was started (--dry-run)" in ended.out
    assert not [path for path in home.rglob("*") if path.is_file()]
    assert not list((home / "studies").iterdir())


def test_interrupted_data_check(tmp_path: Path, data: Path, space: Path) -> None:
    """Ctrl-C ends a check of many large pictures at once, and leaves no study."""
    large = Image.effect_noise((2500, 2500), 80)
    large.save(data / "0.png", compress_level=1)
    rows = "".join(f"{row},0.png,{row % 2},1,1,1\n" for row in range(4000))
    (data / "train.csv").write_text(f"Id,path,Action,Drama,N/A,War\n{rows}")
    home = tmp_path / "home"
    # A shell's background jobs ignore Ctrl-C, and this test may be in one.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{RUN}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "search", str(space), "--data", str(data)],
        env=os.environ | {"TUNER_HOME": str(home)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for((home / "cache").is_dir, process, seconds=100)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        interrupted = time.monotonic()
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert time.monotonic() - interrupted < 45, "4000 pictures were decoded to the end"
    assert err.strip() == "stopped"
    assert not list((home / "studies").iterdir())


# ---- studies and models -----------------------------------------------------------------------


def a_study(home: Path, data: Path, name: str) -> Path:
    """A study that was interrupted before its first trial."""
    from rich.console import Console

    from tuner.home import open_home
    from tuner.preparation import SearchRequest, prepare
    from tuner.spaces.space import load_space
    from tuner.studies.study import create_study

    request = SearchRequest(
        space=load_space(data.parent / "tiny.yaml"), data={"data": data}, study=name,
        skip_bad_images=True,
    )  # fmt: skip
    record, _, split = prepare(request, open_home(home), Console(quiet=True))
    study = create_study(open_home(home), record)
    split.save(study.split_path)
    study.optuna(new=True)
    return study.folder


def test_unknown_study_lists_the_known(tuner: Run, home: Path, data: Path, space: Path) -> None:
    for command in ("trials", "resume"):
        ended = tuner(command, "first")
        assert ended.code == 2
        assert re.search(r"there is no study 'first'\n  there is none yet: tuner search", ended.err)
    for name in ("second", "first"):
        a_study(home, data, name)
    for command in ("trials", "resume"):
        ended = tuner(command, "third")
        assert ended.code == 2
        assert re.search(r"there is no study 'third'\n  there are: first, second\n", ended.err)
    assert tuner("trials", "first", "--json").out == ""


def test_a_study_has_one_session_at_a_time(
    tuner: Run, home: Path, data: Path, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is another process' (here: another file description), and ends with it."""
    from tuner.drivers.presence import driving
    from tuner.home import open_home
    from tuner.studies.study import open_study

    a_study(home, data, "mine")
    study = open_study(open_home(home), "mine")
    with driving(study):
        ended = tuner("resume", "mine")
        assert ended.code == 2
        assert "study mine: another process runs this study now" in ended.err
        assert "wait for its end" in ended.err
    with driving(study):
        pass


def test_damaged_study_record(tuner: Run, home: Path, data: Path, space: Path) -> None:
    folder = a_study(home, data, "mine")
    record = folder / "study.json"
    values = json.loads(record.read_text())
    for text, problem in {
        "{": "the study's record is damaged",
        json.dumps({**values, "format": 99}): "format 99 is not 1",
    }.items():
        record.write_text(text)
        ended = tuner("trials", "mine")
        assert ended.code == 2 and f"{record}: {problem}" in ended.err


RESUME: dict[str, tuple[list[str], str]] = {
    "trials": (["--trials", "0"], "--trials: at least one trial is needed, but got 0"),
    "hours": (["--hours", "0"], "--hours: the time must be positive, but got 0.0"),
    "address": (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray answers there"),
}


@pytest.mark.parametrize("case", RESUME)
def test_resume_with_a_wrong_flag(
    case: str, tuner: Run, home: Path, data: Path, space: Path
) -> None:
    folder = a_study(home, data, "mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags, problem = RESUME[case]
    ended = tuner("resume", "mine", *flags)
    assert ended.code == 2 and problem in ended.err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_of_changed_data(tuner: Run, home: Path, data: Path, space: Path) -> None:
    folder = a_study(home, data, "mine")
    Image.new("RGB", (16, 24), "red").save(data / "5.png")
    ended = tuner("resume", "mine")
    assert ended.code == 2
    assert re.search("the data changed since the study began\n.*new study", ended.err)
    assert (folder / "study.json").exists()


def test_skipped_pictures_are_known_by_their_path(home: Path, data: Path, space: Path) -> None:
    """Two pictures may share a name in two folders: only the damaged one is left out again."""
    from tuner.data import reread_table

    csv = data / "train.csv"
    for folder in ("a", "b"):
        (data / folder).mkdir()
    (data / "6.png").rename(data / "a" / "same.png")
    (data / "7.png").rename(data / "b" / "same.png")
    (data / "b" / "same.png").write_text("damaged")
    csv.write_text(
        csv.read_text().replace("\n6,", "\na/same.png,").replace("\n7,", "\nb/same.png,")
    )
    record = json.loads((a_study(home, data, "mine") / "study.json").read_text())
    assert record["skipped"] == ["b/same.png"]
    table = reread_table({"data": data}, skipped=["b/same.png"], fingerprint=record["fingerprint"])
    assert table.num_images == 23 and "a/same.png" in table.ids


def test_relative_databases_are_found_from_anywhere(
    tuner: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, space: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = tuner(
        "search", space, "--data", data, "--tracking-uri", "sqlite:///runs.db", "--dry-run"
    )
    assert f"sqlite:///{tmp_path}/runs.db" in re.sub(r"\s+", "", ended.out)


def test_unknown_model_lists_those_that_exist(tuner: Run, mlflow_store: Path, data: Path) -> None:
    for address in ("models:/nope@challenger", "models:/posters/7", "models:/posters@champion"):
        ended = tuner("predict", address, data / "0.png")
        assert ended.code == 2
        hint = "there are: models:/posters@challenger"
        assert ended.err == f"error: {address}: no such model\n  {hint}\n"
    ended = tuner("predict", "posters", data / "0.png")
    assert ended.code == 2
    assert re.match("error: posters: no such folder\n  valid: models:/NAME@ALIAS", ended.err)


def test_models_before_any_study(tuner: Run, home: Path, data: Path) -> None:
    ended = tuner("evaluate", "models:/posters@challenger", "--data", data)
    assert ended.code == 2 and "there is no MLflow store" in ended.err
    assert not (home / "mlflow.db").exists(), "looking must not make one"


# ---- ui -------------------------------------------------------------------------------------


def test_ui_on_a_taken_port(tuner: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = tuner("ui", "--port", port)
    assert ended.code == 2
    assert re.search(rf"--port {port}: cannot be listened on \(.*in use\)\n.*port", ended.err)


def test_ui_of_what_is_no_store(tuner: Run) -> None:
    ended = tuner("ui", "--tracking-uri", "http://127.0.0.1:1")
    assert ended.code == 2 and "this is a server already" in ended.err
    ended = tuner("ui", "--tracking-uri", "sqlite:////nowhere/x.db")
    assert ended.code == 2 and "there is no folder /nowhere" in ended.err
    ended = tuner("ui", "--host", "203.0.113.7")
    assert ended.code == 2 and "--host 203.0.113.7" in ended.err


# ---- all of it, on a real Ray -------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_with_a_damaged_picture(tmp_path: Path, data: Path, space: Path) -> None:
    (data / "7.png").write_text("damaged")
    home = tmp_path / "home"

    def run(*args: Any) -> subprocess.CompletedProcess[str]:
        env = {
            k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        }
        return subprocess.run(
            [sys.executable, "-c", RUN, *map(str, args)],
            env=env | {"TUNER_HOME": str(home), "COLUMNS": "200"},
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    search = ("search", space, "--data", data, "--study", "mine", "--skip-bad-images")
    ended = run(*search)
    assert ended.returncode == 0, ended.stderr
    assert "1 damaged pictures are left out" in ended.stdout
    assert f"{data}/7.png: this is not a picture" in ended.stdout
    assert "23 pictures, 4 classes" in ended.stdout
    assert "models:/posters@challenger" in ended.stdout
    lines = [json.loads(line) for line in run("trials", "mine", "--json").stdout.splitlines()]
    assert [trial["status"] for trial in lines] == ["complete"] * 2
    record = (home / "studies" / "mine" / "study.json").read_bytes()
    again = run(*search)
    assert again.returncode == 2 and "a study named 'mine' exists" in again.stderr
    assert (home / "studies" / "mine" / "study.json").read_bytes() == record
    unknown = run("predict", "models:/nope/1", data / "0.png")
    assert unknown.returncode == 2 and "there are: models:/posters@challenger" in unknown.stderr
    predicted = run("predict", "models:/posters@challenger", data / "0.png", "--json")
    assert len(json.loads(predicted.stdout)[0]["probabilities"]) == 4, predicted.stderr
