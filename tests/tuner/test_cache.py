"""The cache can be seen and kept small, and nothing that is in use is ever removed."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import core
from core.encoding.shards import SHARD_ROWS, ShardedMatrix, hold, remove
from core.errors import InputError
from tuner.features.cache import check_room, holding, list_stores, make_room, prune
from tuner.home import open_home
from tuner.trials.context import FeatureRequest

from .conftest import Command

ROWS = SHARD_ROWS + 100
DAY = 86400
REPOSITORY = Path(core.__file__).parents[1]

# Holds a store as a study does, says so, and waits to be killed.
HOLDER = """
import sys, time
from tuner.features.cache import holding
with holding([sys.argv[1]]):
    print("held", flush=True)
    time.sleep(60)
"""


def _store(
    cache: Path,
    name: str,
    *,
    kind: str = "features",
    days_ago: float = 0,
    shards: tuple[int, ...] = (0, 1),
    width: int = 400,
    pictures: str = "abc",
) -> Path:
    """A store of ROWS pictures, closed, last used so long ago."""
    spec = {"pictures": pictures, "input_size": 48, "resize": "squash"}
    if kind == "features":
        spec |= {"backbone": "ffn", "pooling": "avg"}
    matrix = ShardedMatrix(
        cache / kind / name, spec=spec, num_rows=ROWS, row_shape=(width,), dtype="float32"
    )
    for shard in shards:
        rows = matrix.shard_rows(shard)
        matrix.write_shard(shard, np.ones((rows.stop - rows.start, width), np.float32))
    folder = matrix.folder
    del matrix
    gc.collect()
    _age(folder, days_ago)
    return folder


def _age(folder: Path, days: float) -> None:
    then = time.time() - days * DAY
    for name in (".use", "spec.json"):
        os.utime(folder / name, (then, then))


@pytest.fixture
def cache(home: Path) -> Path:
    return open_home().cache


@pytest.fixture
def holder(cache: Path) -> Iterator[Path]:
    """The oldest store, in use by another process."""
    folder = _store(cache, "held", days_ago=90)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield folder
        process.kill()


# ---- what is there ------------------------------------------------------------------------------


def test_an_empty_cache_is_no_error(tuner: Command) -> None:
    assert tuner("cache", "ls").out.startswith("0 stores, 0.0 MB in ")
    assert tuner("cache", "ls", "--json").out == ""


def test_stores_are_listed_with_what_the_disk_gave(tuner: Command, cache: Path) -> None:
    _store(cache, "whole", days_ago=3)
    _store(cache, "half", shards=(1,), width=100_000)
    _store(cache, "pixels", kind="pixels", days_ago=1)
    listed = [json.loads(line) for line in tuner("cache", "ls", "--json").out.splitlines()]
    assert [Path(store["folder"]).name for store in listed] == ["half", "pixels", "whole"]
    half, pixels, whole = listed
    assert [store["complete"] for store in listed] == [False, True, True]
    assert (half["num_done"], half["num_images"]) == (100, ROWS)
    # The matrix of `half` is as long as any, but most of it is a hole.
    assert (cache / "features" / "half" / "matrix.npy").stat().st_size > ROWS * 400_000
    assert 100 * 400_000 <= half["bytes"] < 110 * 400_000
    assert ROWS * 1600 <= whole["bytes"] < ROWS * 1600 * 1.2
    assert whole["spec"]["backbone"] == "ffn" and pixels["kind"] == "pixels"
    text = tuner("cache", "ls").out
    assert "ffn (avg), 48 px" in text and "decoded pictures, 48 px" in text
    assert "100/356" in text and "partly" in text and "complete" in text
    assert "3 days ago" in text


def test_a_label_says_what_sets_features_apart(tuner: Command, cache: Path) -> None:
    folder = _store(cache, "a")
    spec = json.loads((folder / "spec.json").read_text()) | {"blocks": 3, "view": "flip"}
    (folder / "spec.json").write_text(json.dumps(spec))
    assert "ffn (avg, 3 blocks, flip), 48 px" in tuner("cache", "ls").out


def test_a_damaged_store_is_listed_and_can_be_removed(tuner: Command, cache: Path) -> None:
    folder = _store(cache, "broken")
    (folder / "spec.json").write_text("{")
    (folder / "matrix.npy").write_bytes(b"hello")
    assert "? (?), ? px" in tuner("cache", "ls").out
    assert tuner("cache", "prune", "--all").code == 0
    assert not folder.exists()


# ---- pruning ------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(tuner: Command, cache: Path) -> None:
    old, middle, new = (_store(cache, n, days_ago=d) for n, d in (("a", 9), ("b", 5), ("c", 1)))
    each = list_stores(cache)[0].bytes
    ended = tuner("cache", "prune", "--max-gb", 2.5 * each / 1e9)
    assert (old.exists(), middle.exists(), new.exists()) == (False, True, True)
    assert ended.out.count("removed 0.6 MB: ffn (avg), 48 px, used 9 days ago\n") == 1
    assert "the cache is 0.6 MB smaller" in ended.out
    # Opening a store is using it.
    _store(cache, "b", shards=())
    tuner("cache", "prune", "--max-gb", 1.5 * each / 1e9)
    assert (middle.exists(), new.exists()) == (True, False)


def test_by_age_and_all(tuner: Command, cache: Path) -> None:
    old, new = _store(cache, "a", days_ago=9), _store(cache, "b", days_ago=5)
    tuner("cache", "prune", "--older-than", 7)
    assert (old.exists(), new.exists()) == (False, True)
    tuner("cache", "prune", "--all")
    assert not any((cache / "features").iterdir())


def test_what_is_in_use_stays(tuner: Command, cache: Path, holder: Path) -> None:
    other = _store(cache, "other")
    assert "in use" in tuner("cache", "ls").out
    ended = tuner("cache", "prune", "--all")
    assert (holder.exists(), other.exists()) == (True, False)
    assert "kept, as it is in use, 0.6 MB: ffn (avg), 48 px" in ended.out
    assert np.load(holder / "matrix.npy", mmap_mode="r").shape == (ROWS, 400)


def test_a_store_is_free_again_when_its_process_dies(cache: Path, holder: Path) -> None:
    assert not remove(holder)
    (process,) = [s for s in list_stores(cache) if s.in_use]
    assert process.folder == holder


def test_an_open_matrix_is_in_use_until_it_is_let_go(cache: Path) -> None:
    matrix = ShardedMatrix(
        cache / "features" / "x", spec={}, num_rows=ROWS, row_shape=(3,), dtype="float32"
    )
    assert not remove(matrix.folder)
    folder = matrix.folder
    del matrix
    gc.collect()
    assert remove(folder)
    assert list((cache / "features").iterdir()) == []


def test_holding_what_is_gone_says_so(cache: Path) -> None:
    folder = _store(cache, "a")
    with holding([folder]):
        assert not remove(folder)
    assert remove(folder)
    with pytest.raises(InputError, match=r"was pruned(.|\n)*tuner resume"), holding([folder]):
        pass
    with pytest.raises(FileNotFoundError):
        hold(folder)


def test_drafts_of_killed_processes_are_removed(tuner: Command, cache: Path) -> None:
    folder = _store(cache, "a")
    left = [
        folder / ".0123456789abcdef.npy",
        folder / ".spec.json.01234567",
        folder / "shards" / ".000001.json.01234567",
    ]
    trash = cache / "features" / ".b.01234567"
    trash.mkdir()
    (trash / "matrix.npy").write_bytes(b"x" * 5000)
    young = folder / ".fedcba9876543210.npy"
    for path in (*left, young):
        path.write_bytes(b"x" * 5000)
    for path in (*left, trash):
        os.utime(path, (time.time() - 2 * 3600,) * 2)
    tuner("cache", "prune", "--max-gb", 1)
    assert not any(path.exists() for path in (*left, trash))
    assert young.exists() and (folder / ".use").exists() and list_stores(cache)[0].complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "how much is to be kept?"),
        (("--max-gb", -1), "--max-gb: must be 0 or more, but got -1.0"),
        (("--older-than", "nan"), "--older-than: must be 0 or more, but got nan"),
        (("--all", "--max-gb", 1), "only one of"),
    ],
)
def test_mistakes(tuner: Command, cache: Path, arguments: tuple[object, ...], message: str) -> None:
    folder = _store(cache, "a")
    ended = tuner("cache", "prune", *arguments)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err
    assert folder.exists()


# ---- a bound ------------------------------------------------------------------------------------


def test_the_bound_of_the_home(
    tuner: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _store(cache, "a", days_ago=9), _store(cache, "b")
    each = list_stores(cache)[0].bytes
    monkeypatch.setenv("TUNER_CACHE_GB", str(1.5 * each / 1e9))
    assert "of at most 0.9 MB" in tuner("cache", "ls").out
    tuner("cache", "prune")
    assert (old.exists(), new.exists()) == (False, True)
    monkeypatch.setenv("TUNER_CACHE_GB", "10 GB")
    ended = tuner("cache", "ls")
    assert ended.code == 2 and "TUNER_CACHE_GB: expected gigabytes" in ended.err


def _room(cache: Path, limit: int | None) -> list[str] | None:
    """What goes before a study that reads ffn's features of `abc`."""
    request = FeatureRequest(backbone="ffn", image_size=0, pooling="avg")
    pruned = make_room(cache, limit, [request], pictures="abc", num_images=ROWS)
    return None if pruned is None else [store.folder.name for store in pruned.removed]


def test_a_study_makes_room_for_what_it_adds(cache: Path) -> None:
    _store(cache, "own", days_ago=30)
    _store(cache, "old", days_ago=20, pictures="other")
    _store(cache, "new", days_ago=10, pictures="other")
    total = sum(store.bytes for store in list_stores(cache))
    # Decoded pictures of 48 px and features of some width, less what it has already.
    needed = ROWS * (3 * 48**2 + 2048 * 4) - list_stores(cache)[0].bytes
    assert _room(cache, None) is None
    assert _room(cache, total + needed) is None
    assert _room(cache, total + needed - 1) == ["old"]
    # Its own stores stay even where the bound cannot be kept.
    assert _room(cache, 0) == ["new"]
    assert [store.folder.name for store in list_stores(cache)] == ["own"]


def test_a_disk_too_small_for_a_study_is_said(cache: Path) -> None:
    free = shutil.disk_usage(cache.parent).free
    check_room(cache, free // 2)
    message = r"need [\d.]+ GB, and [\d.]+ [GM]B are free: [\d.]+ GB are missing(.|\n)*cache prune"
    with pytest.raises(InputError, match=message) as caught:
        check_room(cache, 2 * free + 10**9)
    assert caught.value.where == str(cache)


def test_a_bound_removes_nothing_that_is_in_use(cache: Path, holder: Path) -> None:
    pruned = prune(cache, max_bytes=0)
    assert pruned.removed == () and [store.folder for store in pruned.held] == [holder]
