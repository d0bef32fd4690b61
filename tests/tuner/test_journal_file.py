"""A study's journal and outcomes where the disk is full, where a kill cut a line, and shared."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from core.errors import InputError
from core.report import Outcome, Status
from tuner.studies.appending import append_whole
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.storage import JOURNAL, open_storage

from ..disks import small_disk


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Files of this process may not grow beyond that: the system's other way to refuse a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def _study(folder: Path, *, new: bool = False) -> optuna.Study:
    storage = open_storage(None, folder)
    if new:
        return optuna.create_study(storage=storage, study_name="s")
    return optuna.load_study(storage=storage, study_name="s")


def _fill(study: optuna.Study) -> int:
    """Tell trials until the journal refuses; how many were told."""
    told = 0
    with pytest.raises(InputError, match=r"journal.log: .*\n.*make room.*tuner resume") as raised:
        while True:
            trial = study.ask()
            study.tell(trial, trial.suggest_float("x", 0, 1))
            told += 1
    assert "Traceback" not in str(raised.value)
    return told


def _check_goes_on(folder: Path, told: int) -> None:
    """What was told is there, and with room the study takes up where it was."""
    study = _study(folder)
    running = [trial for trial in study.trials if trial.state.name == "RUNNING"]
    assert len(study.trials) == told + len(running)
    for trial in running:
        study.tell(trial.number, 0.5)
    study.tell(study.ask(), 0.5)
    # Read by Optuna's own backend, from the beginning.
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    read = optuna.load_study(storage=storage, study_name="s").trials
    assert [t.number for t in read] == list(range(told + len(running) + 1))
    assert {t.state.name for t in read} == {"COMPLETE"}


def test_a_refused_write_leaves_the_journal_whole(tmp_path: Path) -> None:
    study = _study(tmp_path, new=True)
    told = 0
    for limit in range(3000, 3100, 7):  # Another byte of a line is the first too many.
        with at_most(limit):
            told += _fill(study)
        assert (tmp_path / JOURNAL).read_bytes().endswith(b"}\n")
    assert told > 3
    _check_goes_on(tmp_path, told)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_bytes=64 * 1024) as disk:
        study = _study(disk, new=True)
        filler = disk / "filler"
        filler.write_bytes(bytes(48 * 1024))
        told = _fill(study)
        assert told > 3
        with pytest.raises(InputError, match=r"outcomes.jsonl: .*No space left"):
            _log_outcomes(disk, 1000)
        ended = OutcomeLog(disk).read()
        filler.unlink()
        OutcomeLog(disk).trial_ended(len(ended), {}, Outcome(status=Status.FAILED, reason="x"))
        assert sorted(OutcomeLog(disk).read()) == list(range(len(ended) + 1))
        _check_goes_on(disk, told)


def _log_outcomes(folder: Path, count: int) -> None:
    log = OutcomeLog(folder)
    for number in range(count):
        log.trial_ended(number, {}, Outcome(status=Status.FAILED, reason="r" * 200))


@pytest.mark.parametrize("half", [b"", b'{"op', b"x" * 10_000])
def test_half_a_line_is_cut_off(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + half)
    append_whole(path, b"two\nthree\n")
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_file_of_half_a_line_alone_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"x" * 10_000)
    append_whole(path, b"one\n")
    assert path.read_bytes() == b"one\n"


def test_two_processes_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    program = (
        "import sys; from pathlib import Path; from tuner.studies.appending import append_whole\n"
        "for n in range(200):\n"
        "    append_whole(Path(sys.argv[1]), f'[\"{sys.argv[2]}\", {n}]\\n'.encode())"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = [tuple(json.loads(line)) for line in path.read_text().splitlines()]
    for name in ("a", "b"):
        assert [n for writer, n in lines if writer == name] == list(range(200))


def test_parameters_alone_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Optuna's own operations: were their codes others, parameters would wait, or others not."""
    waits = []
    monkeypatch.setattr("os.fsync", waits.append)
    study = _study(tmp_path, new=True)
    waits.clear()
    trial = study.ask()
    assert len(waits) == 1
    for name in "abcdefgh":
        trial.suggest_float(name, 0, 1)
    assert len(waits) == 1
    trial.report(0.5, 1)
    trial.set_user_attr("driver", "me")
    study.tell(trial, 0.5)
    assert len(waits) == 4
    assert _study(tmp_path).trials[0].params.keys() == set("abcdefgh")
