"""A space of two parts as a person runs it: probes, fine-tuning from the best, one winner; the real
command, a real Ray, a real MLflow, drawn posters."""

from __future__ import annotations

import json
import signal

import pytest
from mlflow import MlflowClient
from safetensors import safe_open

from core.synth import draw_posters
from tuner.studies.seeds import choose_seeds
from tuner.studies.study import TrialRecord, open_study

from ..processes import output_of, wait_for
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_PROBES, NUM_FINETUNED = 6, 3
SPACE = f"""
name: staged
probe:
  trials: {NUM_PROBES}
  cohort_size: 6
  pruner: {{name: successive_halving, min_epochs: 2}}
  sampler: random
  parameters:
    backbone: squeezenet1_1
    image_size: 48
    head: [linear, mlp]
    hidden_sizes: {{when: {{head: mlp}}, choice: [[16]]}}
    lr: {{low: 1.0e-3, high: 1.0e-2, log: true}}
    weight_decay: {{low: 0.01, high: 1, log: true}}
    batch_size: 32
    epochs: 6
finetune:
  from_probes: 2
  trials: {NUM_FINETUNED}
  cohort_size: 2
  pruner: none
  sampler: random
  parameters:
    backbone: squeezenet1_1
    image_size: 48
    head: [linear, mlp]
    hidden_sizes: {{when: {{head: mlp}}, choice: [[16]]}}
    head_start: probe
    unfrozen_stages: [1, 2]
    lr: {{low: 1.0e-4, high: 1.0e-3, log: true}}
    head_lr_multiplier: {{low: 1, high: 20, log: true}}
    weight_decay: {{low: 0.01, high: 1, log: true}}
    batch_size: 32
    epochs: 2
"""


def trials_of(place: Workplace, study: str) -> dict[str, list[TrialRecord]]:
    """By part, in the order of their numbers, as `tuner trials --json` tells them."""
    found: dict[str, list[TrialRecord]] = {}
    for row in place.rows(study):
        found.setdefault(row.pop("study"), []).append(TrialRecord(**row))
    return {name: sorted(trials, key=lambda t: t.number) for name, trials in found.items()}


def check_whole(place: Workplace, study: str) -> dict[str, list[TrialRecord]]:
    """Both parts: every trial once in Optuna and in MLflow, none of them running."""
    trials = trials_of(place, study)
    expected = {study: NUM_PROBES, f"{study}-finetune": NUM_FINETUNED}
    assert {name: len(found) for name, found in trials.items()} == expected
    for name, count in expected.items():
        place.check_whole(name, count)
    return trials


def check_seeds(place: Workplace, study: str, trials: dict[str, list[TrialRecord]]) -> list[int]:
    """The first fine-tuning trials hold what the best probes settled; gives those probes."""
    space = open_study(place.home, study).space()
    seeds = choose_seeds(trials[study], space)
    best = sorted(
        (t for t in trials[study] if t.status == "complete"), key=lambda t: -(t.value or 0)
    )
    assert len(seeds) == 2 and [seed.number for seed in seeds] == [p.number for p in best[:2]]
    for probe, trial in zip(best[:2], trials[f"{study}-finetune"][:2], strict=True):
        for name in ("backbone", "image_size", "head", "weight_decay", "batch_size"):
            assert trial.settings[name] == probe.settings[name]
        assert trial.settings.get("hidden_sizes") == probe.settings.get("hidden_sizes")
    return [seed.number for seed in seeds]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quiet_optuna: None) -> Workplace:
    root = tmp_path_factory.mktemp("staged")
    draw_posters(root / "drawn", num_images=150, size=(60, 90))
    return Workplace(root, SPACE, flags=())


@pytest.fixture(scope="module")
def finished(place: Workplace) -> str:
    """The output of a whole search, `one`."""
    return place.run(*place.search("one", "--finalists", "4", "--seeds", "2"))


def test_both_parts_run_and_are_shown(place: Workplace, finished: str) -> None:
    trials = check_whole(place, "one")
    probes = check_seeds(place, "one", trials)
    for text in (
        f"{NUM_PROBES}/{NUM_PROBES} trials",
        f"fine-tuning starts from probes {probes[0]}, {probes[1]}: ",
        "4 left out (lr 2x, epochs 2x)",
        f"{NUM_FINETUNED}/{NUM_FINETUNED} trials",
        f"one: {NUM_PROBES} trials",
        f"one-finetune: {NUM_FINETUNED} trials",
    ):
        assert text in finished, finished
    assert finished.count("top3_accuracy on test") == 1


def test_the_test_split_is_scored_once_for_one_model(place: Workplace, finished: str) -> None:
    probe_parent, _ = place.runs("one")
    parent, _ = place.runs("one-finetune")
    assert parent.data.params["after"] == "one"
    assert parent.data.metrics["test_top3_accuracy"] > 0
    assert not [name for name in probe_parent.data.metrics if name.startswith("test_")]
    winners = [p for p in place.home.studies.glob("*/winner.json") if "one" in p.parent.name]
    assert [path.parent.name for path in winners] == ["one-finetune"]
    winner = json.loads(winners[0].read_text())
    # Probes and fine-tuned trials competed, best validation first, for four places.
    everyone = [
        (study, trial)
        for study, trials in trials_of(place, "one").items()
        for trial in trials
        if trial.status == "complete"
    ]
    everyone.sort(key=lambda pair: (-(pair[1].value or 0), pair[0], pair[1].number))
    assert {(f["study"], f["number"]) for f in winner["finalists"]} == {
        (study, trial.number) for study, trial in everyone[:4]
    }
    client = MlflowClient(place.home.tracking_uri)
    assert len(client.search_model_versions("name = 'drawn'")) == 1
    version = client.get_model_version_by_alias("drawn", "challenger")
    assert version.tags["tuner.study"] == "one-finetune"
    _, children = place.runs(winner["study"])
    tagged = [c.data.tags["tuner.trial"] for c in children if "tuner.winner" in c.data.tags]
    assert tagged == [str(winner["number"])]


def test_heads_of_the_best_probes_are_kept(place: Workplace, finished: str) -> None:
    """One of each structure with a complete probe; fine-tuning began with them."""
    folder = place.folder("one-finetune") / "heads"
    complete = [t for t in trials_of(place, "one")["one"] if t.status == "complete"]
    kinds = {str(t.settings["head"]) for t in complete}
    assert kinds
    index = json.loads((folder / "index.json").read_text())
    best = {
        max((t for t in complete if t.settings["head"] == kind), key=lambda t: t.value or 0).number
        for kind in kinds
    }
    assert set(index.values()) == best
    for key in index:
        with safe_open(folder / f"{key}.safetensors", "pt") as file:
            assert {"layers.0.weight", "layers.0.bias", "mean_D", "deviation_D"} <= set(file.keys())


def test_the_second_part_is_resumed_by_the_first(place: Workplace, finished: str) -> None:
    output = place.run("resume", "one-finetune", code=2)
    assert "study one-finetune: it is the second part of one" in output
    assert "tuner resume one" in output
    refused = place.run(*place.search("one-finetune"), code=2)
    assert "a study named 'one-finetune' exists" in refused


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interruption_between_the_parts_loses_nothing(
    place: Workplace, how: signal.Signals
) -> None:
    study = f"stopped-{how.name.lower()}"
    begun = place.folder(f"{study}-finetune") / "study.json"
    with place.start(*place.search(study, "--model", study)) as process:
        wait_for(begun.exists, process)
        process.send_signal(how)
        output = output_of(process, code=130 if how == signal.SIGINT else -signal.SIGKILL)
    log = place.folder(study) / "outcomes.jsonl"
    before = log.read_text()
    assert before.count("\n") == NUM_PROBES
    points = open_study(place.home, f"{study}-finetune").space().points
    if how == signal.SIGINT:
        assert f"tuner resume {study}\n" in output
    place.run("resume", study)
    assert log.read_text() == before, "no probe ran again"
    assert open_study(place.home, f"{study}-finetune").space().points == points
    trials = trials_of(place, study)
    check_seeds(place, study, trials)
    assert place.logged(f"{study}-finetune") == list(range(NUM_FINETUNED))
