"""Which trials of a round train together, and that each is sent with the features that it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from core.config import TrialConfig
from core.images.views import PLAIN
from core.probing.probe import train_probes
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.outcomes import OutcomeLog
from tuner.studies.plan import make_plan
from tuner.trials import searcher as searching
from tuner.trials.cohort import sources_of
from tuner.trials.context import FeatureRequest
from tuner.trials.searcher import Budget, CohortSearcher

BACKBONES = ("ffn", "resnet18", "squeezenet1_1")
ROWS = 40


def make_space(**other: Any) -> SearchSpace:
    values = {
        "name": "s",
        "trials": 12,
        "cohort_size": 12,
        "sampler": "random",
        "pruner": "none",
        "parameters": {"backbone": list(BACKBONES), "epochs": 2, "batch_size": 8},
    }
    return parse_space({**values, **other})


@pytest.fixture
def features(tmp_path: Path) -> dict[FeatureRequest, str]:
    """A small matrix of each backbone, all of unlike width."""
    (plan,) = [make_plan(make_space(), trials=None, hours=None)]
    folders = {}
    for width, request in enumerate(plan.requests, 3):
        folder = tmp_path / request.backbone
        folder.mkdir()
        np.save(folder / "matrix.npy", np.random.default_rng(width).normal(size=(ROWS, width)))
        folders[request] = str(folder)
    return folders


def cohorts_of(
    space: SearchSpace, features: Mapping[FeatureRequest, str], folder: Path, **options: Any
) -> list[dict[str, Any]]:
    """All that Tune is given, before any ends."""
    searcher = CohortSearcher(
        optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)),
        space,
        budget=Budget(trials=space.trials),
        features=features,
        channel=None,  # type: ignore[arg-type]
        log=OutcomeLog(folder),
        watchers=[],
        seed=0,
        rungs=(),
        **options,
    )
    jobs = []
    while isinstance(job := searcher.suggest(f"tune-{len(jobs)}"), dict):
        jobs.append(job)
    return jobs


def test_a_round_is_one_cohort_on_one_worker(
    features: dict[FeatureRequest, str], tmp_path: Path
) -> None:
    (job,) = cohorts_of(make_space(), features, tmp_path)
    assert sorted(job["numbers"]) == list(range(12))
    assert {values["backbone"] for values in job["trials"]} == set(BACKBONES)
    for values, folders in zip(job["trials"], job["features"], strict=True):
        assert Path(folders[PLAIN.name]).name == values["backbone"]


def test_several_workers_share_a_round_by_what_it_reads(
    features: dict[FeatureRequest, str], tmp_path: Path
) -> None:
    jobs = cohorts_of(make_space(), features, tmp_path, num_workers=2)
    assert len(jobs) == 3
    for job in jobs:
        assert len({values["backbone"] for values in job["trials"]}) == 1


def test_no_worker_of_several_gets_much_more_than_its_share(
    features: dict[FeatureRequest, str], tmp_path: Path
) -> None:
    """One backbone in each: a round of 48 on two and on four workers, a small one on four."""

    def sizes(trials: int, num_workers: int) -> list[int]:
        parameters = {"backbone": "ffn", "epochs": 2, "batch_size": 8}
        space = make_space(trials=trials, cohort_size=trials, parameters=parameters)
        folder = tmp_path / f"{trials}-{num_workers}"
        jobs = cohorts_of(space, features, folder, num_workers=num_workers)
        assert sorted(n for job in jobs for n in job["numbers"]) == list(range(trials))
        return [len(job["trials"]) for job in jobs]

    assert sizes(48, 2) == [24, 24]
    assert sizes(48, 4) == [12, 12, 12, 12]
    assert sizes(12, 4) == [8, 4], "a stack of few heads is mostly calls"


def test_features_that_do_not_fit_together_are_read_by_one_cohort_after_another(
    features: dict[FeatureRequest, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sorted((Path(f) / "matrix.npy").stat().st_size for f in features.values())
    monkeypatch.setattr(searching, "TOGETHER_BYTES", sizes[-1] + sizes[-2])
    jobs = cohorts_of(make_space(), features, tmp_path)
    kinds = Counter(len({values["backbone"] for values in job["trials"]}) for job in jobs)
    assert kinds == {2: 1, 1: 1}
    monkeypatch.setattr(searching, "TOGETHER_BYTES", 1)
    assert len(cohorts_of(make_space(), features, tmp_path)) == 3
    maps = {request: "/nowhere" for request in features}
    assert len(cohorts_of(make_space(), maps, tmp_path)) == 1, "what is not read takes nothing"


def test_fine_tuning_trials_stay_alone(features: dict[FeatureRequest, str], tmp_path: Path) -> None:
    space = make_space(mode="finetune", trials=3)
    pixels = {r: "/nowhere" for r in make_plan(space, trials=None, hours=None).requests}
    jobs = cohorts_of(space, pixels, tmp_path)
    assert [len(job["trials"]) for job in jobs] == [1, 1, 1]


def test_heads_on_several_backbones_train_as_each_alone(
    features: dict[FeatureRequest, str], tmp_path: Path
) -> None:
    """What a worker does with a mixed cohort, against `core` on each backbone's own."""
    from core.probing.probe import train_mixed_probes

    (job,) = cohorts_of(make_space(), features, tmp_path)
    configs = [TrialConfig.from_dict(values) for values in job["trials"]]
    sources, source_of = sources_of(configs, job["features"])
    assert len(sources) == 3
    targets_NC = torch.from_numpy(np.random.default_rng(0).random((ROWS, 4)) < 0.4).float()
    folds = [(np.arange(30), np.arange(30, ROWS))]
    mixed = train_mixed_probes(sources, source_of, targets_NC, folds, configs)
    for config, place, outcome in zip(configs, source_of, mixed, strict=True):
        (alone,) = train_probes(sources[place].features, targets_NC, folds, [config])
        assert len(outcome.curve) == 2
        for mine, its in zip(outcome.curve, alone.curve, strict=True):
            assert mine == pytest.approx(its, rel=1e-4, abs=1e-5)
