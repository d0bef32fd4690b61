"""The process at the other end of `helper_pool.Helper`: hosts groups until its input ends."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any

import torch

from .group import Group, Sources, build_groups
from .helper_pool import READY, Apply, Begin, MatrixFile


def answer(message: Begin | Apply, groups: list[Group]) -> list[Any] | None:
    """Do what a message says to the groups; what is to be sent back, None for nothing."""
    if isinstance(message, Apply):
        return [message.function(group) for group in groups]
    opened = [
        matrix.open() if isinstance(matrix, MatrixFile) else matrix
        for matrix in (message.features, *message.further_views)
    ]
    sources = Sources(features=opened[0], further_views=tuple(opened[1:]))
    groups[:] = build_groups(message.parts, sources, message.task, "cpu")
    return None


def main() -> None:
    """Reads messages from the standard input and writes answers to the standard output."""
    # Signals are for the process that asks: with its end, the input ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # What is printed by accident goes where errors go.
        torch.set_num_threads(1)
        groups: list[Group] = []
        failure: Exception | None = None
        _send(output, READY)
        while True:
            try:
                message = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                if isinstance(message, Begin):
                    failure = None
                elif failure is not None:
                    raise failure
                reply = answer(message, groups)
            except Exception as error:
                failure = error
                reply = None
            if isinstance(message, Apply):
                _send(output, reply if failure is None else failure)


def _send(output: Any, value: object) -> None:
    pickle.dump(value, output, protocol=pickle.HIGHEST_PROTOCOL)
    output.flush()


if __name__ == "__main__":
    main()
