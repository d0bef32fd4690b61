"""What the cache holds, and how it is kept small: the least recently used go first.

A store (`core.encoding.shards`) is a matrix of features or of decoded pictures. One that a process
uses is never removed: a study holds its stores while it runs. Sizes are what the disk gave, as a
matrix that is filled only in part has holes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.encoding.backbones import find_backbone
from core.encoding.shards import SHARD_ROWS, USE_FILE, hold, in_use, remove
from core.errors import InputError
from core.images.views import PLAIN

from ..trials.context import FeatureRequest
from ..views.steps import duration

KINDS = ("features", "pixels")
"""Folders of the cache that hold stores."""
DRAFT_SECONDS = 3600
"""A draft older than this was left by a kill."""
BLOCK = 512
"""Unit of `st_blocks`."""
GB = 10**9
POOLED_BYTES = 2048 * 4
MAP_BYTES = 7 * 7 * 2048 * 2
"""Taken for a picture's features before a backbone is built: those of a large network."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """One store of the cache, as it is now."""

    folder: Path
    kind: str
    """`features` or `pixels`."""
    spec: dict[str, Any]
    """What it is: `spec.json`; empty where that cannot be read."""
    num_images: int
    """Pictures it is made for; 0 if it has no matrix."""
    num_done: int
    """Pictures it holds."""
    bytes: int
    """Allocated on the disk."""
    used: float
    """Last use, `time.time()`."""
    in_use: bool

    @property
    def complete(self) -> bool:
        return 0 < self.num_images == self.num_done

    @property
    def label(self) -> str:
        """For people."""
        size = f"{self.spec.get('input_size', '?')} px"
        if self.kind == "pixels":
            return f"decoded pictures, {size}"
        blocks = self.spec.get("blocks", 1)
        details = [
            str(self.spec.get("pooling", "?")),
            *([f"{blocks} blocks"] if blocks > 1 else []),
        ]
        if self.spec.get("view", PLAIN.name) != PLAIN.name:
            details.append(self.spec["view"])
        return f"{self.spec.get('backbone', '?')} ({', '.join(details)}), {size}"

    @property
    def age(self) -> str:
        """For people: when it was last used."""
        seconds = max(0.0, time.time() - self.used)
        days = int(seconds // 86400)
        return f"{days} days ago" if days >= 2 else f"{duration(seconds)} ago"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "complete": self.complete}


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What pruning came to."""

    removed: tuple[Store, ...]
    held: tuple[Store, ...]
    """Would have been removed, but are in use."""
    draft_bytes: int
    """Freed besides: drafts left by kills."""

    @property
    def freed(self) -> int:
        """Bytes."""
        return sum(store.bytes for store in self.removed) + self.draft_bytes


def list_stores(cache: Path) -> list[Store]:
    """All stores, the most recently used first."""
    folders = [
        (kind, folder)
        for kind in KINDS
        for folder in (cache / kind).glob("[!.]*")
        if folder.is_dir()
    ]
    stores = [_read_store(kind, folder) for kind, folder in folders]
    return sorted(stores, key=lambda store: (-store.used, store.folder))


def prune(
    cache: Path,
    *,
    max_bytes: int | None = None,
    older_than_days: float | None = None,
    keep: Collection[Path] = (),
) -> Pruned:
    """Remove drafts left by kills, then stores, least recently used first.

    Args:
        cache: root of the cache.
        max_bytes: remove until at most this much is left; 0 removes all.
        older_than_days: remove what was not used for so long.
        keep: folders that stay in any case.
    """
    draft_bytes = _remove_drafts(cache)
    stores = list_stores(cache)
    left = sum(store.bytes for store in stores)
    removed, held = [], []
    for store in reversed(stores):
        too_much = max_bytes is not None and left > max_bytes
        days = (time.time() - store.used) / 86400
        too_old = older_than_days is not None and days > older_than_days
        if not (too_much or too_old) or store.folder in keep:
            continue
        if remove(store.folder):
            removed.append(store)
            left -= store.bytes
        else:
            held.append(store)
    return Pruned(removed=tuple(removed), held=tuple(held), draft_bytes=draft_bytes)


def make_room(
    cache: Path,
    limit: int | None,
    requests: Iterable[FeatureRequest],
    *,
    pictures: str,
    num_images: int,
) -> Pruned | None:
    """Before a study: prune what it does not read, until what it is going to add fits in `limit`.

    How large new features are is only known once their backbone is built, so a large one's size
    is taken. None if there is no limit or nothing had to go.
    """
    if limit is None:
        return None
    requests = list(requests)
    stores = list_stores(cache)
    own = [s for s in stores if s.spec.get("pictures") == pictures and _is_read(s, requests)]
    needed = _bytes_of(requests, num_images) - sum(store.bytes for store in own)
    pruned = prune(
        cache, max_bytes=max(0, limit - max(0, needed)), keep={store.folder for store in own}
    )
    return pruned if pruned.removed or pruned.held else None


def check_room(cache: Path, needed: int) -> None:
    """Before anything is computed: whether the disk has room for all that a study is going to
    add, in bytes. Raises InputError."""
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise InputError(
            f"decoded pictures and features need {size_text(needed)}, and {size_text(free)} are "
            f"free: {size_text(needed - free)} are missing",
            where=str(cache),
            hint="make room (`tuner cache prune` removes what is not in use), name a folder on a "
            "larger disk with TUNER_HOME, or take fewer backbones, sizes or views",
        )


@contextmanager
def holding(folders: Iterable[str | Path]) -> Iterator[None]:
    """Keep stores from being removed while the block runs.

    Raises InputError if one is gone already.
    """
    descriptors: list[int] = []
    try:
        for folder in folders:
            try:
                descriptors.append(hold(Path(folder)))
            except FileNotFoundError as error:
                raise InputError(
                    "was pruned while the study started",
                    where=str(folder),
                    hint="tuner resume computes it again",
                ) from error
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def pruned_lines(pruned: Pruned) -> list[str]:
    """What pruning came to, for people: a line a store and the sum."""
    lines = [f"removed {size_text(s.bytes)}: {s.label}, used {s.age}" for s in pruned.removed]
    lines += [f"kept, as it is in use, {size_text(s.bytes)}: {s.label}" for s in pruned.held]
    return [*lines, f"the cache is {size_text(pruned.freed)} smaller"]


def size_text(num_bytes: int) -> str:
    """`1.25 GB`, `3.1 MB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _is_read(store: Store, requests: Sequence[FeatureRequest]) -> bool:
    """Whether one of the requests reads the store, as far as its spec tells."""
    spec = store.spec
    return any(
        spec.get("input_size") == _input_size(request)
        and (store.kind == "pixels" or spec.get("backbone") == request.backbone)
        for request in requests
    )


def _bytes_of(requests: Sequence[FeatureRequest], num_images: int) -> int:
    """About what the stores of all requests take: pixels once a size, features each."""
    pixels = sum(3 * size**2 for size in {_input_size(request) for request in requests})
    features = {"pixels": 0, "map": MAP_BYTES}
    each = sum(features.get(request.pooling, POOLED_BYTES) for request in requests)
    return num_images * (pixels + each)


def _input_size(request: FeatureRequest) -> int:
    return request.image_size or find_backbone(request.backbone).input_size


def _read_store(kind: str, folder: Path) -> Store:
    try:
        spec = json.loads((folder / "spec.json").read_text())
    except (OSError, ValueError):
        spec = {}
    try:
        num_images = len(np.lib.format.open_memmap(folder / "matrix.npy", mode="r"))
    except (OSError, ValueError):
        num_images = 0
    shards = [int(p.stem) for p in (folder / "shards").glob("[!.]*.json") if p.stem.isdigit()]
    rows = [min(SHARD_ROWS, num_images - shard * SHARD_ROWS) for shard in shards]
    return Store(
        folder=folder,
        kind=kind,
        spec=spec if isinstance(spec, dict) else {},
        num_images=num_images,
        num_done=sum(max(0, count) for count in rows),
        bytes=_allocated(folder),
        used=max((_mtime(folder / name) for name in (USE_FILE, "spec.json")), default=0.0),
        in_use=in_use(folder),
    )


def _remove_drafts(cache: Path) -> int:
    """Files and folders begun and never finished; returns how many bytes that freed."""
    freed = 0
    for kind in KINDS:
        found = [*(cache / kind).glob(".*"), *(cache / kind).glob("*/.*"),
                 *(cache / kind).glob("*/shards/.*")]  # fmt: skip
        for path in found:
            if path.name in (USE_FILE, ".lock") or time.time() - _mtime(path) < DRAFT_SECONDS:
                continue
            freed += _allocated(path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return freed


def _allocated(path: Path) -> int:
    """Bytes on the disk of a file, or of all files in a folder."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            total += file.lstat().st_blocks * BLOCK
        except FileNotFoundError:
            continue  # Others work here, too.
    return total


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
