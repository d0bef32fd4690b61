"""A worker's part of a study's features: nothing twice, and the disk is looked at first."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.data.table import Table
from core.encoding import shards
from core.encoding.encoders import build_encoder
from core.encoding.features import PIXELS
from core.errors import InputError
from core.images import pixels as core_pixels
from core.images.pictures import decode_square, open_picture
from tuner.features import feature_work
from tuner.features.feature_work import FeatureWork, do_work, ensure_features, plan_work
from tuner.trials.context import Context, FeatureRequest

from ..contexts import drawn_table, small_context

NUM, SHARD = 130, 50  # shards of 50, 50 and 30 rows
FFN = FeatureRequest(backbone="ffn", image_size=24, pooling="avg")
SMALL = FeatureRequest(backbone="squeezenet1_1", image_size=32, pooling="avg")
LARGE = dataclasses.replace(SMALL, image_size=40)
RAW = FeatureRequest(backbone="squeezenet1_1", image_size=48, pooling=PIXELS)
REQUESTS = [FFN, SMALL, dataclasses.replace(SMALL, view="mirrored"), LARGE, RAW]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return drawn_table(tmp_path_factory.mktemp("work"), NUM)


@pytest.fixture
def context(table: Table, tmp_path: Path) -> Context:
    return small_context(table, tmp_path)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every picture file that is decoded from now on."""
    opened: list[Path] = []

    def counting(path: Path) -> Any:
        opened.append(path)
        return open_picture(path)

    monkeypatch.setattr(core_pixels, "open_picture", counting)
    return opened


def test_no_backbone_of_a_study_decodes_a_picture_again(
    context: Context, decoded: list[Path]
) -> None:
    work = plan_work(context, REQUESTS, (0, 1))
    assert decoded == []
    do_work(context, work)
    assert sorted(decoded) == sorted(context.table.paths)  # four sizes, one decoding
    assert work.missing_bytes() == 0
    for part in work.parts:
        size = part.pixels.spec.input_size
        squares = [decode_square(open_picture(path), size) for path in context.table.paths]
        assert np.array_equal(part.pixels.matrix.open(), np.stack(squares))
    decoded.clear()
    do_work(context, plan_work(context, REQUESTS, (0, 1)))
    assert decoded == []
    # A later study of another size decodes again, and only that size.
    other = dataclasses.replace(LARGE, image_size=36)
    do_work(context, plan_work(context, [*REQUESTS, other], (0, 1)))
    assert sorted(decoded) == sorted(context.table.paths)


def test_sizes_that_nothing_is_missing_of_are_not_made(
    context: Context, decoded: list[Path]
) -> None:
    """Features are there, and their decoded pictures were pruned."""
    do_work(context, plan_work(context, [SMALL], (0, 1)))
    shutil.rmtree(context.cache / "pixels")
    work = plan_work(context, [SMALL, LARGE], (0, 1))
    do_work(context, work)
    done = {p.pixels.spec.input_size: len(p.pixels.matrix.missing_shards()) for p in work.parts}
    assert done == {32: 3, 40: 0}


def test_workers_share_the_shards_and_compute_what_one_does(
    context: Context, decoded: list[Path], tmp_path: Path
) -> None:
    for worker in (2, 0, 1):
        work = plan_work(context, REQUESTS, (worker, 3))
        assert [part.shards for part in work.parts] == [(worker,)] * len(REQUESTS)
        do_work(context, work)
    assert sorted(decoded) == sorted(context.table.paths)
    alone = dataclasses.replace(context, cache=tmp_path / "alone")
    for part in work.parts:
        encoder = build_encoder(
            part.request.backbone, weights="none", input_size=part.request.image_size, seed=0
        )
        matrix = ensure_features(alone, part.request, encoder)
        assert matrix.folder.name == part.matrix.folder.name
        assert np.array_equal(matrix.open(), part.matrix.open())


def test_a_backbone_whose_features_are_there_is_built_once_to_name_them(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = feature_work.build_backbone

    def counting(context: Context, request: FeatureRequest) -> Any:
        built.append(request.label)
        return build(context, request)

    monkeypatch.setattr(feature_work, "build_backbone", counting)
    for expected in (2 * 4, 4):
        built.clear()
        do_work(context, plan_work(context, REQUESTS, (0, 1)))
        assert len(built) == expected


def test_the_disk_is_looked_at_for_all_that_is_missing(
    context: Context, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = NUM * 3 * (24**2 + 32**2 + 40**2 + 48**2) + NUM * 4 * (3 * 24**2 + 3 * 512)
    work = plan_work(context, REQUESTS, (0, 1))
    assert work.missing_bytes() == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed - 1))
    with pytest.raises(InputError, match=r"need 3.8 MB, and 3.8 MB are free(.|\n)*TUNER_HOME"):
        plan_work(context, REQUESTS, (0, 1))
    assert decoded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed))
    do_work(context, plan_work(context, REQUESTS, (0, 1)))


def test_features_that_are_not_finite_name_their_backbone(context: Context) -> None:
    encoder = build_encoder(SMALL.backbone, weights="none", input_size=SMALL.image_size)
    with torch.no_grad():
        next(encoder.network.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match=r"squeezenet1_1 at 32 px \(avg\) gives features that are"):
        ensure_features(context, SMALL, encoder)


def test_work_begun_is_in_use(context: Context) -> None:
    work = FeatureWork(context)
    part = work.add(FFN, build_encoder("ffn", input_size=24))
    assert not shards.remove(part.matrix.folder)
    assert not shards.remove(part.pixels.matrix.folder)
