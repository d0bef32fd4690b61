"""`tuner ui`: a real MLflow server on a study, its pages in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.report import Outcome, Status
from tuner.home import Home, open_home
from tuner.studies.study import StudyRecord, create_study
from tuner.tracking.tracker import Tracker

from ..servers import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with one study of three trials in MLflow, written as a search writes it."""
    home = open_home(tmp_path_factory.mktemp("ui"))
    uri = f"sqlite:///{home.root / 'mlflow.db'}"
    record = StudyRecord(
        name="seen", space={"objective": "top3_accuracy"}, data={}, skipped=(), fingerprint="",
        num_folds=None, seed=0, trials=3, storage=None, tracking_uri=uri, model="pictures",
        weights="none", weights_dir=None,
    )  # fmt: skip
    create_study(home, record)
    tracker = Tracker(
        uri, experiment="pictures", artifacts=home.artifacts, study="seen",
        objective="top3_accuracy", floor=0.4,
    )  # fmt: skip
    tracker.start_study({"sampler": "tpe"})
    for number, value in enumerate((0.3, 0.7, 0.5)):
        tracker.trial_started(number, {"lr": 0.1})
        metrics = {"validation_top3_accuracy": value, "train_loss": 1 - value}
        outcome = Outcome(
            status=Status.COMPLETE, curve=(metrics, metrics), best_epoch=1, best_value=value,
            ended=time.time(),
        )  # fmt: skip
        tracker.trial_ended(number, {"lr": 0.1}, outcome)
    tracker.end_study()
    tracker.close()
    return home


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[list[str]]:
    """The lines that `tuner ui` printed; the server runs while tests do."""
    port = free_port()
    environment = {**os.environ, "TUNER_HOME": str(home.root)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    log = home.root / "ui.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuner", "ui", "--port", str(port)],
            env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        give_up = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < give_up, log.read_text()
                time.sleep(0.3)
        yield log.read_text().splitlines()
    finally:
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, timeout=10
        ).stdout.split()
        process.terminate()
        process.wait(timeout=30)
        for child in children:  # each leads the group of all that it started
            left = subprocess.run(["pgrep", "-g", child], capture_output=True, timeout=10)
            assert left.returncode == 1, f"the server left processes: {left.stdout!r}"
        assert children


@pytest.mark.timeout(200)
def test_the_ui_says_where_it_is_and_links_to_the_trials(server: list[str]) -> None:
    assert re.match(r"MLflow UI: http://127\.0\.0\.1:\d+ ", server[0])
    (link,) = (line for line in server if "trials of seen, best first" in line)
    assert "/#/experiments/1/runs?" in link


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_link_shows_every_trial_best_first(server: list[str], tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: Debian's package is called chromium")
    (line,) = (line for line in server if "trials of seen, best first" in line)
    page = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path}", "--window-size=1600,900",
            "--virtual-time-budget=30000", "--dump-dom", line.split(": ", 1)[1].strip(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.findall(r">seen trial (\d)<", page.stdout)
    assert list(dict.fromkeys(found)) == ["1", "2", "0"], page.stdout[:2000]
