"""Views and stages through the tuner: what a space asks for, computed once, trained and served.

N pictures, C classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import TrialConfig
from core.encoding import features as core_features
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.features import encode
from core.errors import InputError
from core.images import pixels as core_pixels
from core.images.pictures import decode_square, open_picture
from core.images.views import BY_NAME, VIEWS, see
from core.models.model import load_model
from core.probing.probe import train_probes
from core.report import Status, keep_going
from tuner.features.feature_work import ensure_features
from tuner.finalists.crown import FinalistOptions, crown
from tuner.finalists.repeats import MAILBOX, Candidate
from tuner.finalists.winner import best_candidates
from tuner.spaces.file import parse_space
from tuner.studies.plan import feature_requests
from tuner.trials.cohort import train_cohort
from tuner.trials.context import (
    Context,
    FeatureRequest,
    build_backbone,
    request_of,
    view_folders,
    view_requests,
)

from ..contexts import drawn_table, small_context

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32
CONFIG = TrialConfig(
    backbone="squeezenet1_1",
    image_size=SIZE,
    pooling="avg_max",
    blocks=2,
    views="flip",
    epochs=3,
    batch_size=32,
)


class _Runner:
    """Runs the jobs of the finalists here, and keeps what they deliver."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.delivered: list[Any] = []

    def __call__(self, work: Any, payloads: Any, totals: Any) -> list[Any]:
        return [work(self.context, payload, self) for payload in payloads]

    def deliver(self, mailbox: str, item: Any) -> None:
        assert mailbox == MAILBOX
        self.delivered.append(item)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    root = tmp_path_factory.mktemp("views")
    return small_context(drawn_table(root, 150, (60, 90)), root)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(CONFIG.backbone, weights="none", input_size=SIZE)


@pytest.fixture(scope="module")
def features(context: Context, encoder: Encoder) -> dict[FeatureRequest, str]:
    """Folders of all that CONFIG reads."""
    return {
        request: str(ensure_features(context, request, encoder).folder)
        for request in view_requests(request_of(CONFIG), CONFIG.views)
    }


def _space(mode: str = "probe", **parameters: object) -> list[FeatureRequest]:
    values = {"backbone": "squeezenet1_1", **parameters}
    return feature_requests(parse_space({"name": "s", "mode": mode, "parameters": values}))


def test_a_space_asks_for_every_view_that_some_trial_draws_from() -> None:
    assert [r.view for r in _space()] == ["plain"]
    assert [r.view for r in _space(views=["plain", "flip"])] == ["mirrored", "plain"]
    assert [r.view for r in _space(views="flip_crop")] == sorted(BY_NAME)
    some = _space(
        head=["linear", "csra"],
        blocks={"when": {"head": "linear"}, "low": 1, "high": 3},
        views={"when": {"head": "linear"}, "choice": ["plain", "flip"]},
    )
    expected = {("avg", blocks, view) for blocks in (1, 2, 3) for view in ("plain", "mirrored")}
    assert {(r.pooling, r.blocks, r.view) for r in some} == expected | {("map", 1, "plain")}
    assert _space(mode="finetune", blocks=[1, 2]) == [
        FeatureRequest(backbone="squeezenet1_1", image_size=0, pooling="pixels")
    ]


def test_trials_share_a_cohort_whatever_their_views() -> None:
    requests = {request_of(dataclasses.replace(CONFIG, views=views)) for views in VIEWS}
    (request,) = requests
    assert (request.view, request.pooling, request.blocks) == ("plain", "avg_max", 2)
    assert request_of(dataclasses.replace(CONFIG, blocks=1)) != request
    label = "squeezenet1_1 at 32 px (avg_max, last 2 blocks, mirrored)"
    assert dataclasses.replace(request, view="mirrored").label == label
    csra = dataclasses.replace(CONFIG, head="csra")
    assert (request_of(csra).pooling, request_of(csra).blocks) == ("map", 1)


def test_a_job_gets_the_folders_of_its_own_views() -> None:
    plain = request_of(CONFIG)
    other = dataclasses.replace(plain, blocks=1)
    folders = {
        request: f"{request.blocks}-{request.view}"
        for request in [*view_requests(plain, "flip_crop"), *view_requests(other, "flip")]
    }
    assert view_folders(folders, plain) == {name: f"2-{name}" for name in BY_NAME}
    assert view_folders(folders, other) == {"plain": "1-plain", "mirrored": "1-mirrored"}
    with pytest.raises(KeyError):
        view_folders(folders, dataclasses.replace(plain, pooling="max"))


def test_each_view_is_computed_once_and_no_picture_decoded_again(
    context: Context, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh = dataclasses.replace(context, cache=tmp_path)
    counts = {"decoded": 0, "encoded": 0}
    plain_decode, plain_encode = core_pixels.decode_pictures, core_features.encode

    def counting_decode(paths, squares, out):
        counts["decoded"] += len(paths)
        plain_decode(paths, squares, out)

    def counting_encode(encoder, pictures, **settings):
        counts["encoded"] += len(pictures)
        return plain_encode(encoder, pictures, **settings)

    monkeypatch.setattr(core_pixels, "decode_pictures", counting_decode)
    monkeypatch.setattr(core_features, "encode", counting_encode)
    num_images = fresh.table.num_images
    stores = {}
    for _ in range(2):
        for request in view_requests(request_of(CONFIG), "flip_crop"):
            stores[request.view] = ensure_features(fresh, request, encoder)
        assert counts == {"decoded": num_images, "encoded": 10 * num_images}
    assert len({store.folder for store in stores.values()}) == 10
    squares = np.stack([decode_square(open_picture(path), SIZE) for path in fresh.table.paths[:5]])
    for name, store in stores.items():
        expected = encode(encoder, see(squares, BY_NAME[name]), pooling="avg_max", blocks=2)
        np.testing.assert_allclose(store.open()[:5], expected, rtol=1e-4, atol=1e-5)


def test_a_cohort_of_several_views_trains_each_as_core_does(
    context: Context, features: dict[FeatureRequest, str]
) -> None:
    configs = [CONFIG, dataclasses.replace(CONFIG, views="plain")]
    folders = view_folders(features, request_of(CONFIG))
    outcomes = train_cohort(
        context, configs, numbers=[0, 1], features=[folders] * 2, report=keep_going
    )
    matrices = {name: np.load(Path(folder) / "matrix.npy") for name, folder in folders.items()}
    expected = train_probes(
        matrices.pop("plain"),
        torch.from_numpy(context.table.targets_NC).float(),
        context.split.pairs(),
        configs,
        further_views=matrices,
    )
    assert [o.status for o in outcomes] == [Status.COMPLETE] * 2
    for outcome, other in zip(outcomes, expected, strict=True):
        assert outcome.curve == other.curve
    assert outcomes[0].curve != outcomes[1].curve


def test_the_winner_is_served_as_it_was_trained(
    context: Context, features: dict[FeatureRequest, str]
) -> None:
    """From picture files, with two stages pooled twice: `crown` compares them itself, too."""
    candidates = [
        Candidate(
            study="s",
            number=number,
            config=config,
            value=0.5,
            features=view_folders(features, request_of(config)),
        )
        for number, config in enumerate([CONFIG, dataclasses.replace(CONFIG, views="plain")])
    ]
    winner = crown(context, candidates, FinalistOptions(seeds=2), _Runner(context))
    assert [len(f.values) for f in winner.finalists] == [2, 2]
    model = load_model(Path(winner.folder))
    rows = context.split.test[:4]
    served_NC = model.predict([context.table.paths[row] for row in rows])
    assert served_NC.shape == (4, context.table.num_classes)
    assert served_NC.std(0).max() > 1e-3


def test_a_winning_trial_knows_its_views(features: dict[FeatureRequest, str]) -> None:
    from tuner.studies.study import TrialRecord

    (field_names,) = {tuple(f.name for f in dataclasses.fields(TrialRecord))}
    assert {"number", "status", "value", "settings"} <= set(field_names)
    settings = CONFIG.to_dict()
    settings.pop("seed")
    values = dict.fromkeys(field_names) | {
        "number": 3,
        "status": Status.COMPLETE,
        "value": 0.6,
        "settings": settings,
    }
    (candidate,) = best_candidates((TrialRecord(**values),), features, seed=0, study="s")
    assert set(candidate.features) == {"plain", "mirrored"}
    assert candidate.config.views == "flip"


def test_a_fine_tuned_model_of_several_stages_is_served(context: Context, encoder: Encoder) -> None:
    config = dataclasses.replace(CONFIG, mode="finetune", views="plain", epochs=1)
    request = request_of(config)
    folders = {"plain": str(ensure_features(context, request, encoder).folder)}
    (outcome,) = train_cohort(context, [config], numbers=[7], features=[folders], report=keep_going)
    assert outcome.status is Status.COMPLETE
    candidate = Candidate(
        study="s", number=7, config=config, value=outcome.best_value or 0.0, features=folders
    )
    winner = crown(context, [candidate], FinalistOptions(seeds=1), _Runner(context))
    assert winner.finalists[0].values == (winner.validation,)


def test_too_many_blocks_are_said_when_the_backbone_is_built(context: Context) -> None:
    request = dataclasses.replace(request_of(CONFIG), blocks=9)
    with pytest.raises(InputError, match=r"squeezenet1_1 has 4 stages, .* last 9 are too many"):
        build_backbone(context, request)
