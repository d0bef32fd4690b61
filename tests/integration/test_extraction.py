"""Extraction by several Ray Train workers, on a real Ray of two nodes with one core each.

The oracle is one process that computes all by itself; the pictures are few and drawn, and rows
repeat them in a random order, so that there are many rows and many shards.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.table import Table
from core.encoding.features import PIXELS
from core.encoding.shards import SHARD_ROWS, remove
from core.errors import InputError
from tuner.features.extraction import ExtractionProgress, Watch, extract
from tuner.features.feature_work import do_work, plan_work
from tuner.trials.channel import start_channel
from tuner.trials.context import Context, FeatureRequest

from ..contexts import drawn_table, small_context

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NUM_DRAWN, NUM_ROWS, SIZE = 120, 2 * SHARD_ROWS + 50, 32
NUM_SHARDS = 3
PLAIN = FeatureRequest(backbone="squeezenet1_1", image_size=SIZE, pooling="avg")
REQUESTS = [
    PLAIN,
    dataclasses.replace(PLAIN, view="mirrored"),
    FeatureRequest(backbone="squeezenet1_1", image_size=40, pooling="avg"),
    FeatureRequest(backbone="ffn", image_size=0, pooling=PIXELS),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """Two nodes of one core; this process is connected to them."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    pair = Cluster(initialize_head=True, head_node_args=node)
    try:
        pair.add_node(**node)
        ray.init(address=pair.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        pair.shutdown()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    rows = np.random.default_rng(0).integers(0, NUM_DRAWN, NUM_ROWS)
    return drawn_table(tmp_path_factory.mktemp("extraction"), NUM_DRAWN).select(rows)


def _context(table: Table, root: Path, **changes: Any) -> Context:
    context = small_context(table, root, **changes)
    context.folder.mkdir(parents=True, exist_ok=True)
    return context


def _extract(
    context: Context,
    requests: list[FeatureRequest],
    *,
    num_workers: int = 2,
    watch: Watch = lambda news: None,
    holds: ExitStack | None = None,
) -> dict[FeatureRequest, Path]:
    folders = extract(
        context,
        requests,
        start_channel(),
        num_workers=num_workers,
        cpus_per_worker=1,
        gpus_per_worker=0,
        watch=watch,
        holds=holds,
    )
    return {request: Path(folder) for request, folder in folders.items()}


def _matrix(folder: Path) -> np.ndarray:
    return np.load(folder / "matrix.npy", mmap_mode="r")


def _owners(folder: Path) -> dict[int, str]:
    """Shard -> the process that computed it."""
    records = (folder / "shards").glob("*.json")
    return {int(path.stem): json.loads(path.read_text())["by"] for path in records}


def _written(folder: Path) -> dict[int, int]:
    """Shard -> when its record was written, in ns."""
    return {int(p.stem): p.stat().st_mtime_ns for p in (folder / "shards").glob("*.json")}


@pytest.fixture(scope="module")
def expected(
    table: Table, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> dict[FeatureRequest, np.ndarray]:
    """What one process gives, without Ray."""
    context = _context(table, tmp_path_factory.mktemp("alone"))
    work = plan_work(context, REQUESTS, (0, 1))
    do_work(context, work)
    return {part.request: np.array(part.matrix.open()) for part in work.parts}


def test_one_worker_computes_only_what_is_missing_and_the_driver_holds_it(
    nodes: None, table: Table, tmp_path: Path
) -> None:
    context = _context(table, tmp_path)
    requests = [PLAIN, REQUESTS[-1]]
    with ExitStack() as holds:
        folders = _extract(context, requests, num_workers=1, holds=holds)
        assert not any(remove(folder) for folder in folders.values())
    values = np.array(_matrix(folders[PLAIN]))
    before = {request: _written(folder) for request, folder in folders.items()}
    writable = np.load(folders[PLAIN] / "matrix.npy", mmap_mode="r+")
    writable[SHARD_ROWS + 3, 2] += 1
    writable.flush()
    assert _extract(context, requests, num_workers=1) == folders
    assert np.array_equal(_matrix(folders[PLAIN]), values)
    for request, folder in folders.items():
        written = _written(folder)
        changed = [shard for shard in written if written[shard] != before[request][shard]]
        assert changed == ([1] if request == PLAIN else [])


@pytest.mark.slow
def test_two_workers_compute_what_one_does_and_each_picture_once(
    nodes: None, table: Table, expected: dict[FeatureRequest, np.ndarray], tmp_path: Path
) -> None:
    context = _context(table, tmp_path)
    news: list[ExtractionProgress] = []
    with ExitStack() as holds:
        folders = _extract(context, REQUESTS, watch=news.append, holds=holds)
        assert not any(remove(folder) for folder in folders.values())
    assert sorted(folders) == sorted(REQUESTS)
    for request, folder in folders.items():
        # The same batches on the same kind of machine: bit for bit.
        assert np.array_equal(_matrix(folder), expected[request]), request
        owners = _owners(folder)
        assert sorted(owners) == list(range(NUM_SHARDS))
        by_turns = [{owners[s] for s in range(first, NUM_SHARDS, 2)} for first in (0, 1)]
        assert [len(who) for who in by_turns] == [1, 1] and by_turns[0] != by_turns[1]
    for request in REQUESTS:
        last = {n.worker: n for n in news if n.label == request.label}
        assert sorted(last) == [0, 1]
        # What passed each worker's backbone; together every picture once.
        assert [n.done for n in last.values()] == [n.total for n in last.values()]
        assert sum(n.done for n in last.values()) == NUM_ROWS
    assert list((context.folder / "train").iterdir()) == []


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_only_its_shards_in_work(
    nodes: None, table: Table, expected: dict[FeatureRequest, np.ndarray], tmp_path: Path
) -> None:
    context = _context(table, tmp_path)
    killed: list[tuple[int, dict[str, dict[int, str]]]] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            found = {f.name: _owners(f) for f in (context.cache / "features").glob("*")}
            owners = [owner for shards in found.values() for owner in shards.values()]
            if owners:
                process = int(owners[0].split(":")[1])
                os.kill(process, signal.SIGKILL)
                killed.append((process, found))
                return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    folders = _extract(context, REQUESTS)
    killer.join()
    ((process, before),) = killed
    for request, folder in folders.items():
        assert np.array_equal(_matrix(folder), expected[request]), request
        owners = _owners(folder)
        assert sorted(owners) == list(range(NUM_SHARDS))
        # What was there at the death was not computed again.
        kept = before.get(folder.name, {})
        assert {shard: owners[shard] for shard in kept} == kept
    everyone = {owner for folder in folders.values() for owner in _owners(folder).values()}
    assert any(owner.endswith(f":{process}") for owner in everyone)
    assert len(everyone) >= 3


@pytest.mark.slow
def test_a_damaged_picture_is_said_by_whoever_meets_it_and_all_end(
    nodes: None, table: Table, tmp_path: Path
) -> None:
    import ray

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    paths = list(table.paths)
    paths[SHARD_ROWS + 1] = broken  # In the part of the second worker.
    context = _context(dataclasses.replace(table, paths=tuple(paths)), tmp_path)
    with pytest.raises(InputError, match=r"broken\.png: this is not a picture") as caught:
        _extract(context, REQUESTS)
    assert "Traceback" not in str(caught.value)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.1)
    # The next run finds what was done.
    kept = {f.name: _written(f) for f in (context.cache / "pixels").glob("*")}
    mended = dataclasses.replace(context, table=table)
    folders = _extract(mended, [PLAIN], num_workers=1)
    assert sorted(_owners(folders[PLAIN])) == list(range(NUM_SHARDS))
    for folder in (context.cache / "pixels").glob("*"):
        written = _written(folder)
        assert {shard: written[shard] for shard in kept[folder.name]} == kept[folder.name]


@pytest.mark.slow
def test_weights_that_are_missing_are_said_before_anything_is_computed(
    nodes: None, table: Table, tmp_path: Path
) -> None:
    context = _context(table, tmp_path, weights="auto", weights_dir=tmp_path)
    with pytest.raises(InputError, match="squeezenet1_1") as caught:
        _extract(context, REQUESTS)
    assert "Traceback" not in str(caught.value)
    assert not list(context.cache.glob("*/*/shards/*.json"))
