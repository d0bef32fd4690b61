"""Finalists on a real Ray: fine-tuned ones and probes, an ensemble, a refit, and one resume."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from core.config import TrialConfig
from core.encoding.encoders import build_encoder
from core.models.manifest import read_manifest
from core.models.model import load_model
from tuner.features.feature_work import ensure_features
from tuner.finalists import crown as finalists
from tuner.finalists.crown import FinalistOptions, crown
from tuner.finalists.ensemble import EnsembleReport, Part
from tuner.finalists.ray_runner import RayRunner
from tuner.finalists.repeats import Candidate, kept_path, repeats_of, state_path
from tuner.trials.cluster import LOCAL, ONE_WORKER, Share, Workers, cluster
from tuner.trials.context import Context, request_of

from ..contexts import drawn_table, small_context

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROBE = TrialConfig(
    backbone="squeezenet1_1", image_size=32, epochs=3, batch_size=32, lr=0.01, seed=1
)
FINETUNE = dataclasses.replace(
    PROBE, mode="finetune", unfrozen_stages=1, epochs=2, lr=0.001, head_lr_multiplier=10.0
)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    root = tmp_path_factory.mktemp("finalists")
    return small_context(drawn_table(root, 120, (48, 60)), root, rungs=(1,))


@pytest.fixture(scope="module")
def candidates(context: Context) -> list[Candidate]:
    encoder = build_encoder(PROBE.backbone, weights="none", input_size=32)
    return [
        Candidate(
            study=study,
            number=3,
            config=config,
            value=0.5,
            features={"plain": str(ensure_features(context, request_of(config), encoder).folder)},
        )
        for study, config in (("s", FINETUNE), ("s-probes", PROBE))
    ]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with cluster(LOCAL) as found:
        yield found


def two_members(context: Context, ranked: list, *, num_picks: int, run: object) -> object:
    """In the place of the choice, so that it is an ensemble whatever these scores are."""
    parts = [Part(repeat=runs[0][0], weight=0.5) for runs in ranked]
    weights = {part.repeat.candidate.label: part.weight for part in parts}
    report = EnsembleReport(
        num_picks=num_picks, weights=weights, estimate=0.6, single=0.5, registered=True
    )
    return report, parts


def test_probes_and_fine_tuned_trials_end_as_one_refitted_ensemble(
    context: Context,
    candidates: list[Candidate],
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = io.StringIO()
    run = RayRunner(context, workers, ONE_WORKER, Console(file=text))
    chosen = crown(context, candidates, FinalistOptions(seeds=2, ensemble=3), run)
    assert {f.label: len(f.values) for f in chosen.finalists} == {"s/3": 2, "s-probes/3": 2}
    assert chosen.ensemble is not None and chosen.ensemble.estimate is not None
    assert chosen.ensemble.registered == (
        len(chosen.ensemble.weights) > 1 and chosen.ensemble.estimate > chosen.ensemble.single
    )
    assert "finalists again, fine-tuned: epoch: 4/4" in text.getvalue()
    assert "finalists again, probes: epoch: 3/3" in text.getvalue()

    records = sorted((context.folder / "finalists").glob("*.record.json"))
    before = {path: path.stat().st_mtime_ns for path in records}
    assert len(before) == 4
    monkeypatch.setattr(finalists, "choose_ensemble", two_members)
    options = FinalistOptions(seeds=2, ensemble=3, refit=True)
    winner = crown(context, candidates, options, run)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "taken up, not repeated"
    assert winner.finalists == chosen.finalists
    assert winner.refit is not None
    assert winner.refit.epochs.keys() == {"s/3", "s-probes/3"}
    assert winner.refit.num_images == 120 - len(context.split.test)
    folder = Path(winner.folder)
    assert len(read_manifest(folder)["encoders"]) == 2, "the fine-tuned one is another"
    probs_NC = load_model(folder).predict([context.table.paths[r] for r in context.split.test])
    assert np.isfinite(probs_NC).all() and probs_NC.std(0).max() > 1e-3
    assert not list((context.folder / "finalists").glob("checkpoints/*"))


@pytest.mark.slow
# Ray's own, when it imports its data library.
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_worker_group_trains_a_finalist_as_one_worker_does(
    context: Context, candidates: list[Candidate], workers: Workers
) -> None:
    if workers.cpus < 2:
        pytest.skip("two workers need two cores")
    alone = dataclasses.replace(context, folder=context.folder / "alone")
    group = dataclasses.replace(context, folder=context.folder / "group")
    values = []
    for own, share in ((alone, ONE_WORKER), (group, Share(workers=2))):
        run = RayRunner(own, workers, share, Console(file=io.StringIO()))
        winner = crown(own, candidates[:1], FinalistOptions(seeds=1), run)
        (repeat,) = repeats_of(candidates[0], 1)
        assert kept_path(own, repeat, "record.json").exists()
        assert state_path(own, repeat).exists()
        values.append(winner.finalists[0].values)
    assert values[0] == pytest.approx(values[1], abs=0.05)
