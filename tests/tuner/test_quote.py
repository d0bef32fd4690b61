"""What a study is expected to take: the sums, the budgets, and the short measurement."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import TrialConfig
from core.data.split import make_split
from core.data.table import read_table
from core.report import Outcome, Status
from core.synth import draw_posters
from tuner.budgets.calibration import Calibration, Estimate, Note
from tuner.budgets.prices import Features, epochs_share, training_seconds
from tuner.budgets.quote import DRAWN, Crew, Part, Quote, draw_configs, make_quote
from tuner.budgets.quote_view import quote_line, range_text, truth_text
from tuner.budgets.quoting import Subject, quote_of
from tuner.budgets.speeds import (
    SESSION,
    FeatureClock,
    cohort_key,
    epochs_key,
    extraction_key,
    finalists_key,
    first_key,
    notes_of_trials,
    training_key,
)
from tuner.features.extraction import ExtractionProgress
from tuner.finalists.crown import FinalistOptions
from tuner.home import open_home
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.outcomes import EndedTrial
from tuner.studies.plan import Plan, make_plan
from tuner.trials.cluster import Machine, Workers
from tuner.trials.context import FeatureRequest, request_of

CPU = Workers(count=1, cpus=2, gpus=0, machines=(Machine(cpus=2),))
CREW = Crew(device="2 cores", threads=2, devices=1.0, count=1)
ROWS = 4000


def space(**other: Any) -> SearchSpace:
    values = {
        "name": "s",
        "trials": 60,
        "cohort_size": 10,
        "sampler": "random",
        "pruner": "none",
        "parameters": {"backbone": "ffn", "head": "linear", "epochs": 20, "batch_size": 64},
    }
    return parse_space({**values, **other})


def part(of: SearchSpace | None = None, plan: dict[str, Any] | None = None, **other: Any) -> Part:
    of = of or space()
    made = make_plan(of, trials=None, hours=None)
    return Part(
        **{
            "space": of,
            "plan": dataclasses.replace(made, **(plan or {})),
            "done": 0,
            "configs": draw_configs(of),
            "features": (),
            "extractors": CREW,
            "trainers": CREW,
            **other,
        }
    )


def known(of: SearchSpace, *more: Note) -> Calibration:
    """A machine on which everything takes round numbers."""
    config = draw_configs(of)[0]
    return Calibration({}).with_notes(
        [
            (training_key("2 cores", "float32", config), 0.5),
            (cohort_key("2 cores", "probe"), (10.0, 13.0)),  # 3 s beside the training.
            (first_key("2 cores", "probe"), 7.0),
            (extraction_key("2 cores"), (10.0, 15.0)),
            (finalists_key("2 cores", "probe"), (10.0, 20.0)),
            (SESSION, 40.0),
            *more,
        ]
    )


def quote(*parts: Part, calibration: Calibration | None = None, **other: Any) -> Quote:
    options = FinalistOptions(count=5, seeds=3)
    calibration = calibration or known(parts[0].space)
    return make_quote(parts, options, calibration, precision="float32", rows=ROWS, **other)


def test_the_sum_is_that_of_its_terms() -> None:
    quoted = quote(part())
    # 60 trials of 20 epochs of 4,000 rows at 0.5 s a thousand, on two threads; 6 cohorts.
    assert quoted.parts[0].training.value == pytest.approx(60 * 20 * 4 * 0.5 / 2 + 7 + 5 * 3)
    assert quoted.parts[0].extraction.value == pytest.approx(5)
    # 15 repetitions.
    assert quoted.finalists.value == pytest.approx(15 * 20 * 4 * 0.5 / 2 + 10)
    busy = quoted.parts[0].training.value + 5 + quoted.finalists.value
    assert quoted.device_seconds.value == pytest.approx(busy)
    assert quoted.seconds.value == pytest.approx(busy + 40)
    assert quoted.device_seconds.low < busy < quoted.device_seconds.high
    assert quote_line(quoted).startswith("expected: 60 trials in 26 min 17 s (")


def test_trials_that_are_done_and_devices_side_by_side() -> None:
    left = quote(part(done=50))
    assert left.parts[0].wanted == 10
    assert left.parts[0].training.value == pytest.approx(10 * 20 * 4 * 0.5 / 2 + 7)
    finished = quote(part(done=60))
    assert finished.parts[0].training.value == 0 and finished.finalists.value > 0
    four = dataclasses.replace(CREW, count=4, devices=0.5)
    shared = quote(part(trainers=four, extractors=four))
    training = shared.parts[0].training.value
    assert shared.seconds.value == pytest.approx(
        40 + 5 + training / 4 + quote(part()).finalists.value / 4
    )
    assert shared.device_seconds.value == pytest.approx(
        5 * 4 * 0.5 + training * 0.5 + quote(part()).finalists.value * 0.5
    )


def test_features_count_as_far_as_they_lack() -> None:
    request = request_of(draw_configs(space())[0])
    matrix = Features(request=request, num_images=3000, num_cached=1000, decodes=True)
    calibration = known(space(), ("features/2 cores/float32/ffn (avg)/files/many", 0.01))
    quoted = quote(part(features=(matrix,)), calibration=calibration)
    assert quoted.parts[0].features[0][1].value == pytest.approx(20)
    assert quoted.parts[0].extraction.value == pytest.approx(20 + 5)
    # The speed from decoded pictures is only related: the range is wider.
    cached = dataclasses.replace(matrix, decodes=False)
    other = quote(part(features=(cached,)), calibration=calibration).parts[0].features[0][1]
    assert other.value == pytest.approx(20)
    assert other.high > quoted.parts[0].features[0][1].high
    done = dataclasses.replace(matrix, num_cached=3000)
    assert quote(part(features=(done,))).parts[0].features[0][1].high == 0


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ({"seconds": 645.0}, 645 - 40 - 5),
        ({"device_seconds": 405.0}, 400),
        ({"seconds": 645.0, "device_seconds": 405.0}, 400),
        ({"device_seconds": 2.0}, 0),
        ({"seconds": 9e9, "device_seconds": 9e9}, None),
    ],
)
def test_a_budget_of_time_says_how_many_trials_it_holds(
    plan: dict[str, Any], left: float | None
) -> None:
    whole, (quoted,) = quote(part()).parts[0].training.value, quote(part(plan=plan)).parts
    if left is None:
        assert quoted.trials == quoted.wanted == 60
        return
    assert quoted.training.value == pytest.approx(left)
    assert quoted.trials == round(60 * left / whole)
    assert f"about {quoted.trials} of 60 trials" in quote_line(quote(part(plan=plan)))
    spent = quote(part(plan={"device_seconds": 405.0}), used=100.0).parts[0]
    assert spent.training.value == pytest.approx(300), "what earlier sessions used is gone"


@pytest.mark.parametrize("factor", [2, 3])
def test_what_successive_halving_leaves_is_what_ranks_give(factor: int) -> None:
    """The oracle: trials of random values, of which the best part passes each rung."""
    pruner = {"name": "successive_halving", "min_epochs": 3, "reduction_factor": factor}
    of = space(pruner=pruner)
    plan = make_plan(of, trials=None, hours=None)
    alive, epochs, last = np.random.default_rng(0).random(9000), 0.0, 0
    for rung in plan.rungs:
        epochs += len(alive) * (rung - last)
        alive, last = np.sort(alive)[-(len(alive) // factor) :], rung
    epochs += len(alive) * (20 - last)
    share = epochs_share(of, plan, Calibration({}))
    assert share.value == pytest.approx(epochs / 9000 / 20, rel=0.01)
    assert share.low < share.value < share.high <= 1
    seen = Calibration({epochs_key(of.pruner): [0.9, 0.9]})
    learned = epochs_share(of, plan, seen)
    assert learned.value == 0.9 and learned.high == 1.0
    none = epochs_share(space(), plan, Calibration({}))
    assert (none.low, none.high) == (1, 1)


def test_drawn_settings_are_always_the_same_and_points_are_among_them() -> None:
    parameters = {"backbone": "ffn", "lr": {"low": 0.01, "high": 1.0, "log": True}}
    of = space(parameters=parameters, points=[{"lr": 0.123}])
    drawn = draw_configs(of)
    assert len(drawn) == DRAWN and drawn == draw_configs(of)
    assert drawn[0].lr == 0.123 and len({config.lr for config in drawn}) == DRAWN


def test_what_nobody_measured_is_like_what_is_nearest() -> None:
    config = TrialConfig(backbone="ffn", head="mlp", hidden_sizes=(64,), batch_size=64)
    key = training_key("2 cores", "float32", config)
    other = training_key("2 cores", "float32", dataclasses.replace(config, batch_size=8))
    far = training_key("2 cores", "float32", dataclasses.replace(config, backbone="resnet18"))
    calibration = Calibration({other: [4.0], far: [100.0]})
    near = training_seconds(config, "2 cores", "float32", calibration)
    assert near.value == pytest.approx(4.0) and near.high == 8.0
    exact = training_seconds(config, "2 cores", "float32", calibration.with_notes([(key, 9.0)]))
    assert exact.value == 9.0
    unknown = training_seconds(config, "1 gpu", "float32", calibration)
    assert unknown.high / unknown.low == 25.0


def test_a_study_teaches_what_its_like_will_take() -> None:
    """What trials took, told to the next quote, comes back as the same device time."""
    of = space()
    config = draw_configs(of)[0]
    outcome = Outcome(status=Status.COMPLETE, curve=({},) * 20, seconds=8.0)
    ended = {
        number: EndedTrial(number=number, settings=config.to_dict(), outcome=outcome)
        for number in range(60)
    }
    cohorts = [(range(start, start + 10), 8.0 * 10 / 2 + 3) for start in range(0, 60, 10)]
    notes = notes_of_trials(
        cohorts, ended, workers=CPU, precision="float32", rows=ROWS, mode="probe", pruner=of.pruner
    )
    quoted = quote(part(), calibration=Calibration({}).with_notes(notes))
    took = sum(seconds for _, seconds in cohorts)
    assert quoted.parts[0].training.value == pytest.approx(took, rel=0.01)
    assert dict(notes)[epochs_key(of.pruner)] == 1.0
    pruned = dataclasses.replace(outcome, status=Status.PRUNED, curve=({},) * 5, seconds=2.0)
    ended |= {n: dataclasses.replace(ended[n], outcome=pruned) for n in range(30)}
    ended[59] = dataclasses.replace(
        ended[59], outcome=Outcome(status=Status.FAILED, reason="its worker failed")
    )
    learned = dict(
        notes_of_trials(
            cohorts,
            ended,
            workers=CPU,
            precision="float32",
            rows=ROWS,
            mode="probe",
            pruner=of.pruner,
        )
    )
    assert learned[epochs_key(of.pruner)] == pytest.approx((30 * 5 + 29 * 20) / (59 * 20))


def test_an_extraction_teaches_its_passes() -> None:
    clock = FeatureClock()
    for done, seconds in ((500, 5.0), (2000, 20.0)):
        clock(
            ExtractionProgress(
                worker=0, label="a", done=done, total=2000, seconds=seconds, decodes=True
            )
        )
    clock(ExtractionProgress(worker=0, label="b", done=9, total=9, seconds=3.0))
    clock(ExtractionProgress(worker=1, label="a", done=700, total=2000, seconds=7.0))
    assert clock.notes("2 cores", "float32", 31.0) == [
        ("features/2 cores/float32/a/files/many", 0.01),
        (extraction_key("2 cores"), (23.0, 31.0)),
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "posters"
    draw_posters(folder, num_images=120, size=(48, 60))
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_what_no_study_showed_is_measured_and_nothing_is_written(
    drawn: Path, tmp_path: Path, mode: str
) -> None:
    home = open_home(tmp_path / "home")
    table = read_table(drawn)
    split = make_split(table, seed=0, groups=list(range(table.num_images)))
    more = {"unfrozen_stages": 1} if mode == "finetune" else {"head": ["linear", "csra"]}
    of = space(
        mode=mode,
        trials=4,
        parameters={
            "backbone": "squeezenet1_1", "image_size": 32, "epochs": 2, "batch_size": 8, **more
        },
    )  # fmt: skip
    plan = make_plan(of, trials=None, hours=None)
    subject = Subject(
        home=home, table=table, split=split, parts=((of, plan, 0),),
        options=FinalistOptions(), weights="none", weights_dir=None, workers=CPU,
    )  # fmt: skip
    measured, guessed = quote_of(subject), quote_of(subject, measure_seconds=0.0)
    first, _ = measured.parts[0].features[0]
    assert first.num_cached == 0 and first.decodes
    for (_, fine), (_, rough) in zip(
        measured.parts[0].features, guessed.parts[0].features, strict=True
    ):
        assert 0 < fine.low < fine.high and fine.high / fine.low < rough.high / rough.low
    training, rough = measured.parts[0].training, guessed.parts[0].training
    assert training.high / training.low < rough.high / rough.low
    assert not [path for path in home.root.rglob("*") if path.is_file()]


def test_the_truth_stands_beside_what_was_said(tmp_path: Path) -> None:
    class Kept:
        folder = tmp_path

        def __init__(self, **attributes: Any) -> None:
            self.user_attrs = attributes

        def optuna(self) -> Kept:
            return self

    assert truth_text([Kept()]) == ""  # type: ignore[list-item]
    sums = {"features": 90.0, "trials": 600.0, "finalists": 30.0, "wall": 900.0}
    first = Kept(**{"device_seconds:a": sums, "device_seconds:b": {"trials": 360.0}})
    said = quote(part()).to_dict() | {"seconds_before": 3600.0, "device_seconds_before": 0.0}
    assert "expected" not in truth_text([first])  # type: ignore[list-item]
    (tmp_path / "quote.json").write_text(json.dumps(said))
    text = truth_text([first, Kept(**{"device_seconds:c": {"trials": 720.0}})])  # type: ignore[list-item]
    assert "device-hours: 0.5 (features 1 min 30 s, trials 28 min 0 s, finalists 30 s)" in text
    value = said["device_seconds"][1] / 3600
    assert f"expected {value:.2g} (" in text
    assert "time in all: 15 min 0 s; expected " in text
    low, middle, high = (3600 + seconds for seconds in said["seconds"])
    assert text.endswith(range_text(Estimate(low=low, value=middle, high=high)))


def test_plans_hold_budgets_of_time() -> None:
    plan: Plan = make_plan(space(), trials=None, hours=0.5, device_hours=2.0)
    assert (plan.seconds, plan.device_seconds) == (1800.0, 7200.0)
    assert isinstance(plan.requests[0], FeatureRequest)
