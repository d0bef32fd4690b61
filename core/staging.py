"""A folder that is there with everything in it, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder`; it gets the real name when the block ends well.

    After an exception, Ctrl-C included, nothing of it is left. Raises InputError if `folder` is a
    file or has something in it (nothing is ever overwritten), or cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_if_used(folder)
    staging = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise InputError(
            f"cannot make the folder: {error.strerror}", where=str(folder), hint="choose another"
        ) from error
    try:
        yield staging
        _refuse_if_used(folder)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_if_used(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, but a folder is to be made", where=str(folder))
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            "the folder is not empty and nothing is overwritten",
            where=str(folder),
            hint="name a new folder, or remove this one first",
        )
