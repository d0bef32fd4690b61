"""A real search whose storage goes away: PostgreSQL stopped in mid-study, a disk that is full."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ..disks import small_disk
from ..processes import output_of, wait_for
from ..servers import Postgres
from .small_study import NUM_TRIALS, PROBES
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

PASSWORD = "s3cr%40t-word"
AWAY_SECONDS = 30


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, PROBES)


def _url(postgres: Postgres) -> str:
    """The server asks for no password, and takes any."""
    return postgres.url.replace("bench@", f"bench:{PASSWORD}@")


def test_postgres_away_for_30_seconds(place: Workplace, postgres: Postgres) -> None:
    search = place.search("away", "--storage", _url(postgres))
    with place.start(*search) as process:
        wait_for(lambda: place.num_ended("away") >= 4, process)
        postgres.stop()
        before = place.num_ended("away")
        time.sleep(AWAY_SECONDS)
        assert process.poll() is None
        postgres.start()
        output = output_of(process)
    assert before < NUM_TRIALS, "it was over before"
    assert output.count("storage is away (") == 1, output
    assert output.count("storage is back after") == 1, output
    place.check_whole("away", NUM_TRIALS)
    _check_hidden(place, output)
    # The password is known to a later session, too.
    output = place.run("resume", "away", "--trials", str(NUM_TRIALS + 4))
    place.check_whole("away", NUM_TRIALS + 4)
    _check_hidden(place, output)


def _check_hidden(place: Workplace, output: str) -> None:
    """The password stands in one file, for its owner: not in the study's record, which MLflow has
    as well, and in no database or log."""
    secret = PASSWORD.encode()
    holders = [p for p in place.home.root.rglob("*") if p.is_file() and secret in p.read_bytes()]
    assert holders == [place.folder("away") / "credentials.json"]
    assert holders[0].stat().st_mode & 0o777 == 0o600
    assert len(list(place.home.artifacts.rglob("study.json"))) == 1
    assert PASSWORD not in output


def test_postgres_away_for_too_long(place: Workplace, postgres: Postgres) -> None:
    search = place.search("gone", "--storage", _url(postgres))
    with place.start(*search, TUNER_STORAGE_MINUTES="0.05") as process:
        wait_for(lambda: place.num_ended("gone") >= 4, process)
        postgres.stop()
        try:
            output = output_of(process, code=2)
        finally:
            postgres.start()
    assert "Traceback" not in output
    assert "away, for 3 s now" in output and "tuner resume gone" in output
    assert output.count("storage is away (") == 1
    parent, children = place.runs("gone")
    assert "RUNNING" not in {run.info.status for run in (parent, *children)}
    place.run("resume", "gone")
    place.check_whole("gone", NUM_TRIALS)


def test_the_disk_of_the_studies_is_full(place: Workplace, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_bytes=4 * 2**20) as disk:
        place.home.root.mkdir()
        place.home.studies.symlink_to(disk)
        filler = disk / "filler"
        with place.start(*place.search("full")) as process:
            wait_for(lambda: place.num_ended("full") >= 4, process)
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
            output = output_of(process, code=2)
        assert "Traceback" not in output
        assert "No space left" in output and "tuner resume full" in output
        before = place.num_ended("full")
        assert before < NUM_TRIALS
        parent, children = place.runs("full")
        assert "RUNNING" not in {run.info.status for run in (parent, *children)}
        filler.unlink()
        place.run("resume", "full")
        place.check_whole("full", NUM_TRIALS)
