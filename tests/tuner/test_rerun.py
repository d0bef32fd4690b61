"""A trial trained again, without Ray: the recorded trainings are done here, in one stack."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from core.config import TrialConfig
from core.data.split import Split
from core.precision import FLOAT32
from core.report import Outcome, Status
from tuner.features.feature_work import ensure_features
from tuner.home import Home, open_home
from tuner.preparation import SearchRequest, prepare
from tuner.spaces.file import parse_space
from tuner.studies.outcomes import EndedTrial, OutcomeLog
from tuner.studies.study import create_study
from tuner.trials.cohort import train_cohort
from tuner.trials.context import build_backbone, request_of
from tuner.trials.rerun import LOSS_MOST, Verdict, compare

from ..contexts import small_context
from .conftest import Command

pytestmark = pytest.mark.usefixtures("one_thread")

PROBES: dict[str, Any] = {
    "name": "tiny", "trials": 4,
    "parameters": {"backbone": "ffn", "image_size": 16, "lr": [0.01, 0.1], "epochs": 5},
}  # fmt: skip
FINETUNES: dict[str, Any] = {
    "name": "fine", "trials": 1, "mode": "finetune",
    "parameters": {
        "backbone": "squeezenet1_1", "image_size": 32, "unfrozen_stages": 1, "dropout": 0.2,
        "head": "mlp", "hidden_sizes": [[8]], "epochs": 3, "batch_size": 8,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and float32 for the rerun as for the recorded training."""
    monkeypatch.setattr("tuner.trials.cluster.local_threads", lambda: 1)
    monkeypatch.setattr("core.precision.inference_precision", lambda device: FLOAT32)


def _study(
    data: Path, space: dict[str, Any], trials: list[dict[str, Any]], *,
    folds: int | None = None, stops: dict[int, int] | None = None,
) -> Path:  # fmt: skip
    """A study of which these trials have been trained as one cohort; its folder. `stops`: epoch
    after which a trial is pruned."""
    home: Home = open_home()
    request = SearchRequest(
        space=parse_space(space), data={"data": data}, study="s", num_folds=folds, weights="none"
    )
    record, table, split = prepare(request, home, Console(quiet=True))
    study = create_study(home, record)
    split.save(study.split_path)
    configs = [TrialConfig.from_dict(settings) for settings in trials]
    context = small_context(
        table, home.root, split=Split.load(study.split_path, table), cache=home.cache,
        pictures=table.picture_fingerprint(), folder=study.folder, outputs=data.parent / "outputs",
    )  # fmt: skip
    plain = request_of(configs[0])
    store = ensure_features(context, plain, build_backbone(context, plain))
    outcomes = train_cohort(
        context, configs, numbers=range(len(configs)),
        features=[{"plain": str(store.folder)}] * len(configs),
        report=lambda epoch, _: [p for p, last in (stops or {}).items() if last == epoch],
    )  # fmt: skip
    log = OutcomeLog(study.folder)
    for number, (settings, outcome) in enumerate(zip(trials, outcomes, strict=True)):
        log.trial_ended(number, settings, dataclasses.replace(outcome, ended=time.time()))
    return study.folder


def _probe(seed: int, **settings: Any) -> dict[str, Any]:
    head = {"backbone": "ffn", "image_size": 16, "batch_size": 8, "epochs": 5, "lr": 0.01}
    return {"seed": seed, **head, **settings}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_probes_alone_are_as_in_the_stack(tuner: Command, data: Path, home: Path) -> None:
    mlp = {"head": "mlp", "hidden_sizes": [16], "dropout": 0.3}
    trials = [_probe(0), _probe(1, **mlp), _probe(2, **mlp, loss="focal"), _probe(3, epochs=3)]
    folder = _study(data, PROBES, trials, stops={2: 2})
    before = _contents(folder)
    for number, epochs in enumerate([5, 5, 2, 3]):
        ended = tuner("rerun", "s", number)
        assert ended.code == 0, ended.out + ended.err
        assert f"trial {number}: equal" in ended.out
        assert f"│ {epochs} │" in " ".join(ended.out.split()).replace("  ", " ")
        assert f"│ {epochs + 1} │" not in " ".join(ended.out.split())
    assert _contents(folder) == before
    assert not (home / "mlflow.db").exists()


def test_folds(tuner: Command, data: Path) -> None:
    _study(data, PROBES, [_probe(0), _probe(1)], folds=2)
    ended = tuner("rerun", "s", 1)
    assert ended.code == 0 and "trial 1: equal" in ended.out, ended.out


def test_fine_tuning_is_equal_bit_for_bit(tuner: Command, data: Path) -> None:
    """With dropout and augmentation, which chance of their own seeds."""
    settings = {
        "mode": "finetune", "seed": 5, "backbone": "squeezenet1_1", "image_size": 32,
        "unfrozen_stages": 1, "head": "mlp", "hidden_sizes": [8], "dropout": 0.2,
        "horizontal_flip": True, "min_crop_scale": 0.6, "batch_size": 8, "epochs": 3, "lr": 1e-3,
    }  # fmt: skip
    folder = _study(data, FINETUNES, [settings])
    before = _contents(folder)
    ended = tuner("rerun", "s", 0)
    assert ended.code == 0 and "trial 0: equal bit for bit" in ended.out, ended.out
    assert _contents(folder) == before, "a rerun wrote into the study"


def test_another_seed_is_found_out(tuner: Command, data: Path) -> None:
    """Of the trial, and of the study's order of pictures."""
    folder = _study(data, PROBES, [_probe(0)])
    log = folder / "outcomes.jsonl"
    recorded = log.read_text()
    values = json.loads(recorded)
    values["settings"]["seed"] = 1
    log.write_text(json.dumps(values) + "\n")
    ended = tuner("rerun", "s", 0)
    assert ended.code == 1 and "trial 0: different: " in ended.out, ended.out
    assert "of epoch 1 was" in ended.out
    log.write_text(recorded)
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(record | {"seed": 7}))
    assert tuner("rerun", "s", 0).code == 1


def test_trials_without_a_curve_are_refused(tuner: Command, data: Path) -> None:
    folder = _study(data, PROBES, [_probe(0)])
    reason = Outcome(status=Status.FAILED, reason="its worker failed: no power")
    OutcomeLog(folder).trial_ended(1, _probe(1), reason)
    for number, text in ((1, "failed before its first epoch"), (9, "trials 0 to 1 have one")):
        ended = tuner("rerun", "s", number)
        assert ended.code == 2 and text in ended.err, ended.err
    assert "no power" in tuner("rerun", "s", 1).err


def _trial(curve: list[float]) -> EndedTrial:
    points = tuple({"train_loss": value, "validation_top3_accuracy": 0.5} for value in curve)
    outcome = Outcome(status=Status.COMPLETE, curve=points)
    return EndedTrial(number=0, settings={}, outcome=outcome)


@pytest.mark.parametrize(
    "factors, verdict",
    [
        ([1.0, 1.0, 1.0], Verdict.BITWISE),
        ([1 + 9e-6, 1 + 1.9e-5, 1 + 3.9e-5], Verdict.CLOSE),
        ([1 + 1.2e-5, 1.0, 1.0], Verdict.DIFFERENT),
        ([1.0, 1.0, 1 + 5e-5], Verdict.DIFFERENT),
        ([1.0] * 30 + [1 + 0.9 * LOSS_MOST], Verdict.CLOSE),
        ([1.0] * 30 + [1 + 1.1 * LOSS_MOST], Verdict.DIFFERENT),
    ],
)
def test_the_tolerance_grows_with_the_epochs(factors: list[float], verdict: Verdict) -> None:
    then = [0.7 - 0.01 * epoch for epoch in range(len(factors))]
    now = [value * factor for value, factor in zip(then, factors, strict=True)]
    found = compare(_trial(then), _trial(now).outcome, objective="top3_accuracy", num_labels=1000)
    assert found.verdict is verdict
    assert bool(found.reason) == (verdict is Verdict.DIFFERENT)


def test_another_length_or_end_is_different() -> None:
    trial = _trial([0.7, 0.6])
    shorter = _trial([0.7]).outcome
    found = compare(trial, shorter, objective="top3_accuracy", num_labels=1000)
    assert found.verdict is Verdict.DIFFERENT and "2 epochs then, and 1 now" in found.reason
    failed = dataclasses.replace(trial.outcome, status=Status.FAILED)
    found = compare(trial, failed, objective="top3_accuracy", num_labels=1000)
    assert found.verdict is Verdict.DIFFERENT
    assert torch.get_num_threads() == 1
