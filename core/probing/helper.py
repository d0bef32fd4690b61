"""The process at the other end of `helper_pool.Helper`: hosts groups until its input ends."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any

import torch

from ..kernels.ready import load_kernels
from .group import Group, GroupBuilder
from .helper_pool import READY, Apply, Begin, Give, Take
from .kept_inputs import KeptInputs


class Hosted:
    """The groups of this process, by key."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}
        self._builder: GroupBuilder | None = None
        self._kept = KeptInputs()

    def answer(self, message: Begin | Take | Give | Apply) -> Any:
        """Do what a message says; what is to be sent back if it is a question."""
        if isinstance(message, Begin):
            sources = [source.open() for source in message.sources]
            inputs = self._kept.of_cohort(sources, "cpu")
            self._builder = GroupBuilder(sources, message.task, inputs)
            self._groups = {key: self._builder.begin(p) for key, p in message.parts.items()}
        elif isinstance(message, Take):
            assert self._builder is not None
            self._groups[message.key] = self._builder.go_on(message.state)
        elif isinstance(message, Give):
            return self._groups.pop(message.key).state
        else:
            return [message.function(group) for group in self._groups.values()]
        return None


def main() -> None:
    """Reads messages from the standard input and writes answers to the standard output."""
    # Signals are for the process that asks: with its end, the input ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # What is printed by accident goes where errors go.
        torch.set_num_threads(1)
        load_kernels()
        hosted = Hosted()
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
                reply = hosted.answer(message)
            except Exception as error:
                failure = error
                reply = None
            if isinstance(message, Apply | Give):
                _send(output, reply if failure is None else failure)


def _send(output: Any, value: object) -> None:
    pickle.dump(value, output, protocol=pickle.HIGHEST_PROTOCOL)
    output.flush()


if __name__ == "__main__":
    main()
