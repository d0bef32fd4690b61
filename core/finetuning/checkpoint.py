"""Checkpoints of one training run: written whole or not at all, so that a kill loses one epoch.

The one before is kept, too: a file that a crash of the machine damaged costs a further epoch, not
the run. A full disk is the person's to mend, so it is an `InputError` that names the folder; what
was written earlier stays as it was. Nothing is unpickled: `weights_only` reads tensors and plain
values.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NoRoomError

LAST = "last.pt"
PREVIOUS = "previous.pt"
DRAFT = "last.part"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing that more room would mend."""
DAMAGED = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError)
"""A damaged file fails in as many ways as there are layers that read it."""

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder of one trial's checkpoints. One process writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a new last checkpoint: tensors, numbers, texts, lists and mappings of them.

        Raises:
            InputError: the disk is full, or the folder cannot be written. `load` still gives the
                checkpoint of before.
        """
        draft = self.folder / DRAFT
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                _write(state, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if draft.exists():
                draft.unlink()
            raise self._cannot_write(state, error) from error
        last = self.folder / LAST
        if last.exists():
            last.replace(self.folder / PREVIOUS)
        draft.replace(last)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that can be read, on the CPU; None if there is none."""
        for name in (LAST, PREVIOUS):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except DAMAGED as error:
                _logger.warning("%s is damaged and left out: %s", path, error)
                continue
            return state
        return None

    def remove(self) -> None:
        """Delete the folder with all checkpoints; it need not be there."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _cannot_write(self, state: Mapping[str, Any], error: OSError) -> InputError:
        if error.errno not in FULL:
            return InputError(
                f"a checkpoint cannot be written: {error.strerror}",
                where=str(self.folder),
                hint="let this user write there, or name another folder with TUNER_HOME",
            )
        needed = num_bytes(state)
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            free = needed  # not even that can be read: nothing is known of what is missing
        # With a quota or a limit on files, the disk itself has room, and nobody says how much.
        missing = f", {_megabytes(needed - free)} more than there is" if free < needed else ""
        return NoRoomError(
            f"no room for a checkpoint: it takes {_megabytes(needed)}{missing} ({error.strerror})",
            where=str(self.folder),
            hint="free some room, or name a folder on another disk with TUNER_HOME; "
            "earlier checkpoints are whole",
        )


def num_bytes(state: Any) -> int:
    """What the tensors in a state take, each storage counted once, as torch writes it."""
    sizes: dict[int, int] = {}
    rest = [state]
    while rest:
        part = rest.pop()
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, Mapping):
            rest.extend(part.values())
        elif isinstance(part, (list, tuple)):
            rest.extend(part)
    return sum(sizes.values())


def _write(state: Mapping[str, Any], file: Any) -> None:
    """torch.save, but a failed write is the OSError that it was, not what torch makes of it."""
    noting: Any = _NotingErrors(file)
    try:
        torch.save(dict(state), noting)
    except (OSError, RuntimeError):
        if noting.error is not None:
            raise noting.error from None
        raise


class _NotingErrors:
    """A file to write to that remembers the first error."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _megabytes(size: int) -> str:
    return f"{max(size, 0) / 1e6:,.1f} MB"
