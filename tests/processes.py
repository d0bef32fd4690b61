"""Processes that tests start, wait for, and look after: none outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ended_with_the_block(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kills the process and its group if they are still there, as when a test fails: to wait for
    it would hold up all other tests. It must lead a group of its own."""
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def output_of(process: subprocess.Popen[str], *, code: int = 0, seconds: float = 800) -> str:
    """All that it prints until it ends; fails with it if the exit code is another."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


def comes_about(
    holds: Callable[[], object],
    *processes: subprocess.Popen[str],
    seconds: float = 300,
    pause: float = 0.01,
) -> bool:
    """Wait until it holds; False if one of the processes ended before."""
    give_up = time.monotonic() + seconds
    while not holds():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() < give_up, f"it did not come to that point in {seconds} s"
        time.sleep(pause)
    return True


def wait_for(
    holds: Callable[[], object],
    *processes: subprocess.Popen[str],
    seconds: float = 300,
    pause: float = 0.01,
) -> None:
    """Wait until it holds; fails with what one of the processes printed if that ended before."""
    if not comes_about(holds, *processes, seconds=seconds, pause=pause):
        ended = next(process for process in processes if process.poll() is not None)
        raise AssertionError(f"ended before, code {ended.returncode}: {ended.communicate()[0]}")


def family(pid: int) -> dict[int, bytes]:
    """Processes that this one started, or that those started, with their command lines."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        parents[int(folder.name)] = int(fields[1])
    found = {}
    for candidate in parents:
        ancestor = candidate
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        if ancestor == pid and candidate != pid:
            found[candidate] = command(candidate)
    return found


def command(pid: int) -> bytes:
    """A process' command line; empty if it has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def without_agents(processes: dict[int, bytes]) -> dict[int, bytes]:
    """Without Ray's agents, which take a minute or more to miss the rest when that is killed."""
    return {pid: text for pid, text in processes.items() if b"Agent" not in text}


def left_of(processes: dict[int, bytes], *, seconds: float = 60) -> dict[int, bytes]:
    """Those of the processes that are still there after some time; none, if all is well."""
    give_up = time.monotonic() + seconds
    while True:
        left = {pid: text for pid, text in processes.items() if text and command(pid) == text}
        if not left or time.monotonic() > give_up:
            return left
        time.sleep(0.2)
