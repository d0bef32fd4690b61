"""The end of a study in this process, without Ray: who wins, what is kept, what is saved.

N pictures, C classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from core.config import TrialConfig
from core.encoding.encoders import build_encoder
from core.encoding.inputs import feature_statistics
from core.errors import InputError
from core.metrics import topk_recall
from core.models.manifest import read_manifest
from core.models.model import load_model
from core.probing.probe import train_probes
from core.report import Status
from tuner.features.feature_work import ensure_features
from tuner.finalists.crown import FinalistOptions, Winner, crown
from tuner.finalists.ensemble import choose_ensemble
from tuner.finalists.repeats import (
    MAILBOX,
    Candidate,
    Job,
    Record,
    Repeat,
    kept_path,
    repeats_of,
    state_path,
)
from tuner.finalists.view import finalist_table, model_lines
from tuner.finalists.winner import winner_metrics, winner_tags
from tuner.goals.constraints import RECALL
from tuner.trials.cohort import save_state
from tuner.trials.context import Context, request_of

from ..contexts import drawn_table, small_context

PIXELS = TrialConfig(backbone="ffn", image_size=16, epochs=4, batch_size=32, lr=0.003, seed=11)
CONVOLUTIONS = TrialConfig(
    backbone="squeezenet1_1", image_size=32, pooling="avg_max", blocks=2, epochs=6, batch_size=32,
    lr=0.01, seed=12, loss="cross_entropy",
)  # fmt: skip
SLOW = dataclasses.replace(CONVOLUTIONS, lr=1e-5, seed=13)
SEED_OFFSET = 500_000_003


class Channel:
    """Keeps what jobs deliver."""

    def __init__(self) -> None:
        self.delivered: list[Any] = []

    def deliver(self, mailbox: str, item: Any) -> None:
        assert mailbox == MAILBOX
        self.delivered.append(item)


class InProcess:
    """A `Runner` without Ray, which is killed after `lives` jobs."""

    def __init__(self, context: Context, lives: int | None = None) -> None:
        self.context = context
        self.lives = lives
        self.trained: list[Repeat] = []
        self.channel = Channel()

    def __call__(self, work: Any, payloads: Sequence[Any], totals: Mapping[str, int]) -> list[Any]:
        results = []
        before = len(self.channel.delivered)
        for payload in payloads:
            if isinstance(payload, Job):
                if self.lives == 0:
                    raise KeyboardInterrupt
                self.lives = None if self.lives is None else self.lives - 1
                self.trained += payload.repeats
            result = work(self.context, payload, self.channel)
            if isinstance(result, InputError):
                raise result
            results.append(result)
        last: dict[tuple[str, int], int] = {}
        for place, step, done in self.channel.delivered[before:]:
            last[step, place] = done
        sums = {step: sum(n for (s, _), n in last.items() if s == step) for step in totals}
        assert sums == dict(totals), "progress does not end at its total"
        return results


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Context:
    root = tmp_path_factory.mktemp("finalists")
    return small_context(drawn_table(root, 150, (60, 90)), root, rungs=(1, 2))


@pytest.fixture
def context(study: Context, tmp_path: Path) -> Context:
    """The study with an empty folder; the cache is shared."""
    return dataclasses.replace(study, folder=tmp_path / "study")


@pytest.fixture(scope="module")
def folders(study: Context) -> dict[str, dict[str, str]]:
    """Backbone -> view's name -> folder of its features."""
    found = {}
    for config in (PIXELS, CONVOLUTIONS):
        encoder = build_encoder(config.backbone, weights="none", input_size=config.image_size)
        store = ensure_features(study, request_of(config), encoder)
        found[config.backbone] = {"plain": str(store.folder)}
    return found


@pytest.fixture
def candidates(folders: dict[str, dict[str, str]]) -> list[Candidate]:
    """Their values in the search are in the wrong order."""
    return [
        Candidate(
            study="s",
            number=number,
            config=config,
            value=value,
            features=folders[config.backbone],
        )
        for number, config, value in ((4, SLOW, 0.9), (2, CONVOLUTIONS, 0.6), (7, PIXELS, 0.5))
    ]


def trained_alone(context: Context, candidate: Candidate, seed: int, **settings: Any) -> Any:
    matrix = np.load(Path(candidate.features["plain"]) / "matrix.npy")
    config = dataclasses.replace(
        candidate.config, seed=candidate.config.seed + SEED_OFFSET * (1 + seed)
    )
    targets_NC = torch.from_numpy(context.table.targets_NC).float()
    settings = {"folds": context.split.pairs(), **settings}
    (outcome,) = train_probes(
        matrix, targets_NC, configs=[config], keep_state=True, order_seed=0, **settings
    )
    return outcome


def test_the_best_mean_wins_and_optimism_is_told(
    context: Context, candidates: list[Candidate]
) -> None:
    winner = crown(context, candidates, FinalistOptions(seeds=2), InProcess(context))
    expected = {
        c.number: [trained_alone(context, c, seed).best_value for seed in range(2)]
        for c in candidates
    }
    assert {f.number: list(f.values) for f in winner.finalists} == expected
    means = {number: np.mean(values) for number, values in expected.items()}
    assert [f.number for f in winner.finalists] == sorted(means, key=lambda n: -means[n])
    assert winner.number == max(means, key=lambda n: means[n]) != 4
    assert [f.spread for f in winner.finalists] == pytest.approx(
        [np.std(expected[f.number], ddof=1) for f in winner.finalists]
    )
    searched = {c.number: c.value for c in candidates}[winner.number]
    assert winner.optimism == pytest.approx(searched - means[winner.number])
    assert winner.validation == max(expected[winner.number])
    assert (winner.ensemble, winner.refit) == (None, None)


def test_the_saved_model_is_the_best_repetition(
    context: Context, candidates: list[Candidate]
) -> None:
    """Its test score, once more from picture files."""
    winner = crown(context, candidates, FinalistOptions(seeds=2), InProcess(context))
    split, table = context.split, context.table
    model = load_model(Path(winner.folder))
    probs_NC = model.predict([table.paths[row] for row in split.test])
    targets_NC = table.targets_NC[split.test]
    expected = float(topk_recall(torch.from_numpy(probs_NC), torch.from_numpy(targets_NC), 3))
    scores = winner.evaluation
    assert scores["top3_accuracy"] == pytest.approx(expected, abs=0.02)
    assert scores["top3_accuracy_low"] < scores["top3_accuracy"] < scores["top3_accuracy_high"]
    predicted_NC = probs_NC >= np.array(model.thresholds)
    f1 = f1_score(targets_NC, predicted_NC, average="micro", zero_division=0)
    assert scores["micro_f1"] == pytest.approx(f1, abs=0.03)
    assert model.metadata["trial"] == winner.number
    assert model.metadata["refit"] is None


def test_a_kill_in_the_middle_loses_no_finished_repetition(
    context: Context, candidates: list[Candidate]
) -> None:
    undisturbed = dataclasses.replace(context, folder=context.folder / "other")
    expected = crown(undisturbed, candidates, FinalistOptions(seeds=2), InProcess(undisturbed))
    first = InProcess(context, lives=1)
    with pytest.raises(KeyboardInterrupt):
        crown(context, candidates, FinalistOptions(seeds=2), first)
    assert 0 < len(first.trained) < 6
    second = InProcess(context)
    winner = crown(context, candidates, FinalistOptions(seeds=2), second)
    assert {r.key for r in first.trained}.isdisjoint(r.key for r in second.trained)
    assert len(first.trained) + len(second.trained) == 6
    assert winner.finalists == expected.finalists
    assert winner.evaluation == expected.evaluation
    third = InProcess(context)
    assert crown(context, candidates, FinalistOptions(seeds=2), third) == winner
    assert third.trained == []
    more = InProcess(context)
    crown(context, candidates, FinalistOptions(seeds=3), more)
    before = {r.key for r in [*first.trained, *second.trained]}
    again = [r.key for r in more.trained if r.key in before]
    assert len(more.trained) - len(again) == 3, "one further seed of each"
    assert len(again) <= 1, "at most the one whose weights are wanted now and were cleared"


def test_weights_are_cleared_but_the_winners(context: Context, candidates: list[Candidate]) -> None:
    run = InProcess(context)
    winner = crown(context, candidates, FinalistOptions(seeds=2), run)
    kept = list((context.folder / "finalists/states").iterdir())
    assert len(kept) == 1
    assert len(list((context.folder / "finalists").glob("*.record.json"))) == 6
    paths = [context.table.paths[row] for row in context.split.test]
    before_NC = load_model(Path(winner.folder)).predict(paths)
    kept[0].unlink()
    again = InProcess(context)
    other = crown(context, candidates, FinalistOptions(seeds=2), again)
    assert len(again.trained) == 1, "only the one that is needed"
    assert other.number == winner.number
    # A head trained alone is the one that was trained in a stack, but for rounding.
    np.testing.assert_allclose(load_model(Path(other.folder)).predict(paths), before_NC, atol=1e-3)


def test_a_damaged_record_is_named(context: Context, candidates: list[Candidate]) -> None:
    crown(context, candidates[2:], FinalistOptions(seeds=1), InProcess(context))
    (path,) = (context.folder / "finalists").glob("*.record.json")
    path.write_text("{")
    with pytest.raises(InputError, match=r"record\.json: is damaged"):
        crown(context, candidates[2:], FinalistOptions(seeds=1), InProcess(context))


def test_trials_of_two_studies_compete(context: Context, candidates: list[Candidate]) -> None:
    """The same number and settings in both: two finalists all the same."""
    rival = dataclasses.replace(candidates[1], study="s-probes", value=0.7)
    winner = crown(context, [rival, candidates[1]], FinalistOptions(seeds=1), InProcess(context))
    assert [(f.study, f.number) for f in winner.finalists] == [("s", 2), ("s-probes", 2)]
    assert winner.finalists[0].values == winner.finalists[1].values
    assert (winner.study, winner.number) == ("s", 2), "of equals the first by name"
    assert finalist_table(winner).columns[0]._cells == ["s/2", "s-probes/2"]


def test_a_finalist_that_diverges_once_or_always(
    context: Context, candidates: list[Candidate]
) -> None:
    wild = dataclasses.replace(
        candidates[2], config=dataclasses.replace(PIXELS, optimizer="sgd", lr=3e38)
    )
    winner = crown(context, [wild, candidates[1]], FinalistOptions(seeds=2), InProcess(context))
    assert [f.number for f in winner.finalists] == [2]
    run = InProcess(context)
    with pytest.raises(InputError, match="no finalist could be trained again: diverged in epoch"):
        crown(context, [wild], FinalistOptions(seeds=2), run)
    assert len(run.trained) == 2, "a failed repetition is tried again"


# ---- refit --------------------------------------------------------------------------------------


def test_a_refit_sees_all_rows_but_test_for_the_epochs_that_were_best(
    context: Context, candidates: list[Candidate]
) -> None:
    plain = crown(context, candidates[1:2], FinalistOptions(seeds=3), InProcess(context))
    metadata = load_model(Path(plain.folder)).metadata
    before = read_manifest(Path(plain.folder))
    run = InProcess(context)
    winner = crown(context, candidates[1:2], FinalistOptions(seeds=3, refit=True), run)
    runs = [trained_alone(context, candidates[1], seed) for seed in range(3)]
    epochs = round(np.mean([r.best_epoch for r in runs]))
    rows = np.union1d(context.split.train, context.split.validation)
    assert winner.refit is not None
    assert winner.refit.epochs == {"s/2": epochs}
    assert (
        winner.refit.num_images == len(rows) == context.table.num_images - len(context.split.test)
    )
    assert [(r.last_epoch, r.candidate.number) for r in run.trained] == [(epochs, 2)]

    best = int(np.argmax([r.best_value for r in runs]))
    folds = [(rows, context.split.validation)]
    refit = trained_alone(context, candidates[1], best, folds=folds, last_epoch=epochs)
    model = load_model(Path(winner.folder))
    (member,) = model._members
    for name, value in member.head.state_dict().items():
        torch.testing.assert_close(value, refit.state[name])
    matrix = np.load(Path(candidates[1].features["plain"]) / "matrix.npy")
    mean_D, _ = feature_statistics(matrix, rows)
    torch.testing.assert_close(member.feature_mean_D, mean_D)

    after = read_manifest(Path(winner.folder))
    assert after["thresholds"] == before["thresholds"]
    assert after["calibration"] == before["calibration"]
    assert winner.validation == plain.validation
    assert winner.evaluation["top3_accuracy"] != plain.evaluation["top3_accuracy"]
    record = model.metadata["data"]
    assert record["num_train"] == len(rows)
    assert "v" in metadata["data"]["parts"] and "v" not in record["parts"], (
        "nobody is to score it on rows that it was trained on"
    )
    assert model.metadata["refit"]["epochs"] == [epochs]
    (text,) = [text for name, text in model_lines(winner) if name == "refit"]
    assert "thresholds and calibration are from the validation scores before it" in text


# ---- ensembles ----------------------------------------------------------------------------------


def _ranked(
    context: Context, candidates: Sequence[Candidate], noise: float, num_seeds: int = 3
) -> tuple[list[list[tuple[Repeat, Record]]], np.ndarray]:
    """Repetitions with made-up validation logits: the truth behind noise, of its own for each."""
    _, rows = context.split.pairs()[0]
    targets_NC = context.table.targets_NC[rows]
    rng = np.random.default_rng(3)
    ranked, probs = [], []
    for candidate in candidates:
        runs = []
        for repeat in repeats_of(candidate, num_seeds):
            logits_NC = 2.0 * targets_NC - 1 + noise * rng.normal(size=targets_NC.shape)
            path = kept_path(context, repeat, "validation.safetensors")
            save_state(path, {"logits_NC": torch.from_numpy(logits_NC).float()})
            record = Record(status=Status.COMPLETE, reason="", value=0.5, best_epoch=1, seconds=1.0)
            runs.append((repeat, record))
            probs.append(torch.from_numpy(logits_NC).sigmoid().numpy())
        ranked.append(runs)
    return ranked, np.array(probs).reshape(len(candidates), num_seeds, *targets_NC.shape)


def _top3(probs_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    best_N3 = np.argsort(-probs_NC, axis=1, kind="stable")[:, :3]
    hits = np.take_along_axis(targets_NC, best_N3, 1).sum(dtype=np.int64)
    return float(hits / targets_NC.sum(dtype=np.int64))


def test_an_ensemble_that_helps_is_taken_and_both_numbers_are_told(
    context: Context, candidates: list[Candidate]
) -> None:
    ranked, probs = _ranked(context, candidates, noise=1.5)
    report, parts = choose_ensemble(context, ranked, num_picks=6, run=InProcess(context))
    _, rows = context.split.pairs()[0]
    targets_NC = context.table.targets_NC[rows]
    assert report.single == pytest.approx(
        np.mean([_top3(probs_NC, targets_NC) for probs_NC in probs[0]])
    )
    assert report.registered and report.estimate is not None and report.estimate > report.single
    assert report.weights == {p.repeat.candidate.label: p.weight for p in parts}
    assert sum(report.weights.values()) == pytest.approx(1)
    assert len({p.repeat.config.seed - p.repeat.candidate.config.seed for p in parts}) == 1, (
        "members of one seed"
    )


def test_an_ensemble_that_does_not_help_is_not(
    context: Context, candidates: list[Candidate]
) -> None:
    """A sure winner among members that know nothing."""
    good, _ = _ranked(context, candidates[:1], noise=0.1)
    bad, _ = _ranked(context, candidates[1:], noise=100.0)
    report, parts = choose_ensemble(context, [*good, *bad], num_picks=6, run=InProcess(context))
    assert not report.registered and parts == []
    assert report.estimate == report.single


def test_finalists_that_failed_under_a_seed_are_not_in_the_library(
    context: Context, candidates: list[Candidate]
) -> None:
    ranked, _ = _ranked(context, candidates, noise=1.5)
    for runs in ranked[:2]:
        repeat, record = runs[1]
        runs[1] = (repeat, dataclasses.replace(record, value=None, status=Status.FAILED))
    report, _ = choose_ensemble(context, ranked, num_picks=6, run=InProcess(context))
    assert set(report.weights) == {"s/7"}
    assert not report.registered
    ranked[2][0] = (ranked[2][0][0], ranked[1][1][1])
    report, parts = choose_ensemble(context, ranked, num_picks=6, run=InProcess(context))
    assert (report.estimate, report.weights, parts) == (None, {}, [])


def test_an_ensemble_is_refitted_saved_and_served(
    context: Context, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever wins here, the library is forced on two members; the rest is as ever."""
    from tuner.finalists import crown as finalists
    from tuner.finalists.ensemble import EnsembleReport, Part

    def two(context: Context, ranked: Any, *, num_picks: int, run: Any) -> Any:
        shares = zip(ranked, (0.75, 0.25), strict=True)
        parts = [Part(repeat=runs[1][0], weight=weight) for runs, weight in shares]
        weights = {p.repeat.candidate.label: p.weight for p in parts}
        report = EnsembleReport(
            num_picks=num_picks, weights=weights, estimate=0.7, single=0.6, registered=True
        )
        return report, parts

    monkeypatch.setattr(finalists, "choose_ensemble", two)
    options = FinalistOptions(seeds=2, refit=True, ensemble=4)
    run = InProcess(context)
    winner = crown(context, candidates[1:], options, run)
    labels = [f.label for f in winner.finalists]
    assert winner.refit is not None and list(winner.refit.epochs) == labels
    folder = Path(winner.folder)
    manifest = read_manifest(folder)
    assert [spec["weight"] for spec in manifest["members"]] == [0.75, 0.25]
    assert manifest["metadata"]["members"][1]["weight"] == 0.25
    model = load_model(folder)
    assert model.input_size == 32
    paths = [context.table.paths[row] for row in context.split.test]
    probs_NC = torch.from_numpy(model.predict(paths))
    targets_NC = torch.from_numpy(context.table.targets_NC[context.split.test])
    expected = float(topk_recall(probs_NC, targets_NC, 3))
    assert winner.evaluation["top3_accuracy"] == pytest.approx(expected, abs=0.02)
    kept = {path.name for path in (context.folder / "finalists/states").iterdir()}
    refits = [repeat for repeat in run.trained if repeat.last_epoch is not None]
    assert kept == {state_path(context, repeat).name for repeat in refits}
    assert len(kept) == 2

    metrics, tags = winner_metrics(winner), winner_tags(winner)
    assert (metrics["ensemble_estimate"], metrics["ensemble_single"]) == (0.7, 0.6)
    assert json.loads(tags["tuner.ensemble_weights"]) == {labels[0]: 0.75, labels[1]: 0.25}
    assert tags["tuner.model"] == "ensemble"
    assert json.loads(tags["tuner.refit_epochs"]) == winner.refit.epochs
    lines = dict(model_lines(winner))
    first, second = (f.number for f in winner.finalists)
    assert lines["ensemble"].startswith(f"75.0 % of trial {first}, 25.0 % of trial {second}: ")
    assert "70.0 % against 60.0 %" in lines["ensemble"]
    values = winner.to_dict()
    assert json.loads(json.dumps(values)) == values | {
        "finalists": [dict(row, values=list(row["values"])) for row in values["finalists"]]
    }
    assert [row["mean"] for row in values["finalists"]] == [f.mean for f in winner.finalists]


# ---- what is asked for and what is told ---------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "--finalists: at least 1"),
        ({"seeds": 0}, "--seeds: at least 1"),
        ({"ensemble": 1}, "--ensemble: at least 2"),
        ({"ensemble": 3, "seeds": 1}, "--ensemble: an ensemble is judged by seeds"),
    ],
)
def test_options_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinalistOptions(**settings)


def test_metrics_and_tags_hold_every_finalist(
    context: Context, candidates: list[Candidate]
) -> None:
    winner: Winner = crown(context, candidates, FinalistOptions(seeds=2), InProcess(context))
    metrics, tags = winner_metrics(winner), winner_tags(winner)
    for rank, finalist in enumerate(winner.finalists, 1):
        assert metrics[f"finalist_{rank}_mean"] == np.mean(finalist.values)
        assert metrics[f"finalist_{rank}_in_search"] == finalist.value
    assert metrics["optimism"] == winner.optimism
    assert metrics["test_top3_accuracy_low"] < metrics["test_top3_accuracy"]
    assert tags["tuner.finalists"] == ", ".join(f.label for f in winner.finalists)
    assert tags["tuner.model"] == "single"
    table = finalist_table(winner)
    assert table.row_count == 3
    assert table.columns[0]._cells == [str(f.number) for f in winner.finalists]


# ---- constraints --------------------------------------------------------------------------------


def test_a_finalist_that_neglects_a_class_is_out(
    context: Context, candidates: list[Candidate]
) -> None:
    runs = {c.number: [trained_alone(context, c, seed) for seed in range(2)] for c in candidates}
    recalls = {n: np.mean([r.best_metrics[RECALL] for r in pair]) for n, pair in runs.items()}
    assert recalls[4] < recalls[7] < recalls[2], "what follows needs two that differ"
    bounds = {"min_class_recall": float(recalls[7] + recalls[2]) / 2}
    options = FinalistOptions(seeds=2)
    winner = crown(context, candidates, options, InProcess(context), bounds=bounds)
    assert winner.number == winner.finalists[0].number == 2
    assert [bool(f.out) for f in winner.finalists] == [False, True, True]
    found = {f.number: f.worst_class_recall for f in winner.finalists}
    assert found == pytest.approx(recalls)
    table = finalist_table(winner)
    reasons = list(table.columns[-1].cells)
    assert reasons[0] == "" and "its worst class has a recall of 0." in str(reasons[1])
    assert len(finalist_table(crown(context, candidates, options, InProcess(context))).columns) == 7
    bounds = {"min_class_recall": 0.99}
    with pytest.raises(InputError, match="every finalist violates a constraint once it is trained"):
        crown(context, candidates, options, InProcess(context), bounds=bounds)


def test_the_model_itself_keeps_the_constraint(
    context: Context, candidates: list[Candidate]
) -> None:
    """Where a finalist does on average, but its best repetition does not."""
    candidate = candidates[2]
    first, second = (trained_alone(context, candidate, seed) for seed in range(2))
    recalls = [r.best_metrics[RECALL] for r in (first, second)]
    assert first.best_value > second.best_value and recalls[0] < recalls[1], "for what follows"
    bounds = {"min_class_recall": float(np.mean(recalls))}
    options = FinalistOptions(seeds=2)
    winner = crown(context, [candidate], options, InProcess(context), bounds=bounds)
    assert winner.validation == second.best_value
    free = crown(context, [candidate], options, InProcess(context))
    assert free.validation == first.best_value
