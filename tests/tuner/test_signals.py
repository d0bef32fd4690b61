"""Answers to signals, in processes of their own that do nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LONG = 90
"""Seconds that nothing here takes, even on a busy machine."""

START = """
import signal, subprocess, sys, time
from tuner import signals
from tuner.signals import *
signal.signal(signal.SIGINT, signal.default_int_handler)

def say(text):
    print(text, flush=True)
"""


class Process:
    """Runs a script that says `ready`, sends it signals and sees how it ends."""

    def __init__(self, script: str) -> None:
        # Without a buffer: what is in one after `readline` is lost to `communicate`.
        self._process = subprocess.Popen(
            [sys.executable, "-c", START + script], bufsize=0, cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._says(b"ready\n")

    def _says(self, line: bytes) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == line

    def end(self, *numbers: int) -> tuple[int, str, str]:
        """Exit code, output and errors after these signals; each after the first is sent when the
        process has said `saving`."""
        try:
            for count, number in enumerate(numbers):
                if count:
                    self._says(b"saving\n")
                self._process.send_signal(number)
            out, err = self._process.communicate(timeout=LONG)
        finally:
            self._process.kill()
        return self._process.returncode, out.decode(), err.decode()


SAVING = """
@stoppable()
def work():
    going_on_with("tuner resume s")
    try:
        say("ready")
        time.sleep(300)
    finally:
        say("saving")
        time.sleep(SECONDS)
        say("saved")

try:
    work()
except BaseException as error:
    sys.exit(exit_code(interruption(error)))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_the_process_save(number: int, code: int) -> None:
    ended = Process(SAVING.replace("SECONDS", "0.5")).end(number)
    assert ended == (code, "saving\nsaved\n", "")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(second: int) -> None:
    code, out, err = Process(SAVING.replace("SECONDS", f"{2 * LONG}")).end(signal.SIGTERM, second)
    assert (code, out) == (143, "")
    assert "ended at once (a second signal)" in err and "Go on with: tuner resume s" in err


def test_what_hangs_is_left_behind_with_all_it_started() -> None:
    script = """
signals.Stop.__init__.__kwdefaults__["grace"] = 1.0
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, file=sys.stderr, flush=True)
""" + SAVING.replace("SECONDS", f"{2 * LONG}")
    code, out, err = Process(script).end(signal.SIGTERM)
    assert (code, out) == (143, "saving\n")
    assert "ended at once (1 s after the first signal)" in err
    child = Path(f"/proc/{err.split()[0]}/cmdline")
    give_up = time.monotonic() + LONG
    while child.exists() and child.read_bytes():
        assert time.monotonic() < give_up, "a child is left"
        time.sleep(0.05)


def test_answers_of_others_are_undone_and_their_exits_are_ours() -> None:
    script = """
def others(number, frame):
    sys.exit(number)

@stoppable()
def work():
    with own_signals():
        signal.signal(signal.SIGTERM, others)
    try:
        with own_signals():
            signal.signal(signal.SIGTERM, others)
            say("ready")
            time.sleep(300)
    except Interrupted as error:
        say(f"interrupted by {error.number}")
        check_stopped()

before = signal.getsignal(signal.SIGTERM)
try:
    work()
except Interrupted as error:
    assert signal.getsignal(signal.SIGTERM) is before
    sys.exit(exit_code(error.number))
"""
    assert Process(script).end(signal.SIGTERM) == (143, "interrupted by 15\n", "")


def test_tune_ends_in_its_own_way() -> None:
    script = """
asked = []

@stoppable()
def work():
    with tune_stops():
        signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
        say("ready")
        while not asked:
            time.sleep(0.01)
        say("Tune is over")
    say("trials are told")
    check_stopped()

try:
    work()
except Interrupted as error:
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    sys.exit(exit_code(error.number))
"""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert Process(script).end(number) == (code, "Tune is over\ntrials are told\n", "")


def test_an_ignored_signal_stays_ignored() -> None:
    """Ctrl-C in a terminal is not for a shell's background jobs."""
    script = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with stoppable():
    say("ready")
    time.sleep(1.5)
say("done")
"""
    assert Process(script).end(signal.SIGINT) == (0, "done\n", "")


def test_another_threads_handlers_are_left_alone() -> None:
    script = """
import threading
def work():
    with stoppable(), own_signals(), tune_stops():
        check_stopped()
    say("ready")
thread = threading.Thread(target=work)
thread.start()
thread.join()
say("done")
"""
    assert Process(script).end() == (0, "done\n", "")
