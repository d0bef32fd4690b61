"""A quote with costs in it: measuring them takes time, and what they refuse takes none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tuner.session
from core.data.split import make_split
from core.data.table import read_table
from core.errors import InputError
from core.synth import draw_posters
from tuner.budgets.calibration import NOTHING, Calibration, read_calibration
from tuner.budgets.device_time import COSTS, FEATURES, DeviceMeter, busy_seconds
from tuner.budgets.model_costs import (
    CostsAhead,
    costs_ahead,
    costs_key,
    measuring_seconds,
    notes_of_costs,
    trained,
)
from tuner.budgets.quote import Crew, Part, Quote, draw_configs, make_quote
from tuner.budgets.quote_view import quote_rows
from tuner.budgets.quoting import Subject, quote_of
from tuner.budgets.speeds import SESSION, cohort_key, first_key, training_key
from tuner.finalists.crown import FinalistOptions
from tuner.goals.costs import Costs, Shape, keep_costs, shapes_of, unmeasured
from tuner.goals.judge import Judge
from tuner.home import open_home
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace
from tuner.studies.plan import make_plan
from tuner.trials.cluster import Machine, Workers

from .small_drivers import study_in

CPU = Workers(count=1, cpus=2, gpus=0, machines=(Machine(cpus=2),))
CREW = Crew(device="2 cores", threads=2, devices=1.0, count=1)
BOUND: dict[str, Any] = {"constraints": {"latency_ms": 20}}
PARAMETERS = {
    "backbone": "ffn", "image_size": [16, 32, 64], "head": "linear", "epochs": 20,
    "batch_size": 64,
}  # fmt: skip


def space(**other: Any) -> SearchSpace:
    values = {"name": "s", "trials": 60, "cohort_size": 10, "pruner": "none", "sampler": "random"}
    return parse_space({**values, "parameters": PARAMETERS, **other})


def costs_of(of: SearchSpace, slow: tuple[int, ...] = (64,)) -> dict[Shape, Costs]:
    """Models that read pictures of these sizes are too slow."""
    return {
        shape: {"latency_ms": 50.0 if shape.image_size in slow else 5.0, "size_mb": 1.0}
        for shape in shapes_of(of)
    }


def ahead_of(
    of: SearchSpace,
    measured: Mapping[Shape, Costs] | None = None,
    calibration: Calibration | None = None,
) -> CostsAhead:
    calibration = calibration or Calibration({})
    return costs_ahead(of, draw_configs(of), measured or {}, "2 cores", calibration)


def quote(of: SearchSpace, costs: CostsAhead) -> Quote:
    """On a machine on which everything takes round numbers."""
    configs = draw_configs(of)
    notes = [(training_key("2 cores", "float32", config), 0.5) for config in configs]
    notes += [
        (cohort_key("2 cores", "probe"), (10.0, 13.0)), (first_key("2 cores", "probe"), 7.0),
        (SESSION, 40.0), (costs_key("2 cores"), (3.0, 15.0)),
    ]  # type: ignore[list-item]  # fmt: skip
    part = Part(
        space=of, plan=make_plan(of, trials=None, hours=None), done=0,
        configs=trained(configs, costs), features=(), extractors=CREW, trainers=CREW, costs=costs,
    )  # fmt: skip
    calibration = Calibration({}).with_notes(notes)
    return make_quote([part], FinalistOptions(), calibration, precision="float32", rows=4000)


def test_without_costs_nothing_changes() -> None:
    of = space()
    assert ahead_of(of) == CostsAhead()
    quoted = quote(of, CostsAhead())
    assert quoted.parts[0].measuring == NOTHING
    assert not [name for name, _ in quote_rows(quoted) if "costs" in name or "refused" in name]


def test_measuring_is_counted_and_has_a_line() -> None:
    of = space(objectives=["top3_accuracy", "latency_ms"])
    ahead = ahead_of(of)
    assert ahead.num_unmeasured == 3 and ahead.known and ahead.kept.low == 1
    before, after = quote(of, CostsAhead()), quote(of, ahead)
    assert after.parts[0].measuring.value == pytest.approx(15)
    assert after.seconds.value - before.seconds.value == pytest.approx(15)
    assert after.device_seconds.value - before.device_seconds.value == pytest.approx(15)
    assert after.parts[0].training == before.parts[0].training
    rows = dict(quote_rows(after))
    assert rows["costs of 3 kinds of models take"].startswith("15 s (")
    measured = costs_of(of)
    assert ahead_of(of, measured).num_unmeasured == 0
    del measured[shapes_of(of)[0]]
    assert ahead_of(of, measured).num_unmeasured == 1
    guess = measuring_seconds(ahead, "1 gpu", Calibration({}))
    assert 0 < guess.low < guess.value < guess.high


def test_refused_configurations_take_no_time() -> None:
    of = space(**BOUND)
    ahead = ahead_of(of, costs_of(of))
    configs = draw_configs(of)
    share = sum(config.image_size != 64 for config in configs) / len(configs)
    assert 0.3 < share < 0.9
    assert (ahead.kept.low, ahead.kept.value, ahead.kept.high) == (share, share, 1.0)
    assert {config.image_size for config in trained(configs, ahead)} == {16, 32}
    quoted = quote(of, ahead)
    training = quoted.parts[0].training
    # 20 epochs of 4,000 rows at 0.5 s a thousand, on two threads: only for what is trained.
    assert training.value == pytest.approx(60 * share * 20 * 4 * 0.5 / 2 + 7 + (6 - 1) * 3)
    whole = quote(of, CostsAhead()).parts[0].training
    assert training.value < whole.value
    assert training.high > 60 * 20 * 4 * 0.5 / 2, "the sampler may learn what is refused"
    refused = quoted.parts[0].refused
    assert refused is not None and refused.low == 0
    assert refused.value == pytest.approx(60 * (1 - share))
    rows = dict(quote_rows(quoted))
    assert rows["refused by constraints"].startswith(f"about {round(refused.value)} (0 to ")


def test_what_is_not_known_is_said() -> None:
    of = space(**BOUND)
    ahead = ahead_of(of)
    assert not ahead.known and ahead.num_unmeasured == 3
    assert len(trained(draw_configs(of), ahead)) == len(draw_configs(of))
    quoted = quote(of, ahead)
    assert quoted.parts[0].refused is None
    rows = dict(quote_rows(quoted))
    assert "not known before costs are measured" in rows["refused by constraints"]
    assert quoted.parts[0].training == quote(of, CostsAhead()).parts[0].training


def test_a_study_teaches_what_the_next_one_will_refuse() -> None:
    """As far as its device is the same. A cost near the bound widens the range."""
    of = space(**BOUND)
    calibration = Calibration({}).with_notes(notes_of_costs("2 cores", costs_of(of), 12.0))
    ahead = ahead_of(of, calibration=calibration)
    assert ahead.known and ahead.num_unmeasured == 3, "each study measures for itself"
    assert ahead.kept == ahead_of(of, costs_of(of)).kept
    assert not costs_ahead(of, draw_configs(of), {}, "1 gpu", calibration).known
    line = calibration.line(costs_key("2 cores"))
    assert line is not None and line(3).value == pytest.approx(12.0)
    near = space(constraints={"latency_ms": 6})
    narrow = ahead_of(near, costs_of(near, slow=(32, 64)))
    wide = ahead_of(near, calibration=Calibration({}).with_notes(
        notes_of_costs("2 cores", costs_of(near, slow=(32, 64)), 12.0)
    ))  # fmt: skip
    assert wide.kept.value == narrow.kept.value and wide.kept.low == 0 < narrow.kept.low


def test_everything_refused_is_no_training() -> None:
    of = space(**BOUND)
    ahead = ahead_of(of, costs_of(of, slow=(16, 32, 64)))
    assert ahead.kept.value == 0
    assert quote(of, ahead).parts[0].training.value == 0


@pytest.mark.usefixtures("one_thread")
def test_features_of_what_is_refused_are_not_quoted(tmp_path: Path) -> None:
    draw_posters(tmp_path / "posters", num_images=120, size=(48, 60))
    table = read_table(tmp_path / "posters")
    of = space(**BOUND)
    plan = make_plan(of, trials=None, hours=None)
    values: dict[str, Any] = {
        "home": open_home(tmp_path / "home"), "table": table, "parts": ((of, plan, 0),),
        "split": make_split(table, seed=0, groups=range(table.num_images)),
        "options": FinalistOptions(), "weights": "none", "weights_dir": None, "workers": CPU,
    }  # fmt: skip
    unknown = quote_of(Subject(**values), measure_seconds=0.0).parts[0]
    known = quote_of(Subject(**values, costs=(costs_of(of),)), measure_seconds=0.0).parts[0]
    assert [f.request.image_size for f, _ in unknown.features] == [16, 32, 64]
    assert [f.request.image_size for f, _ in known.features] == [16, 32]
    assert (unknown.num_measured, known.num_measured) == (3, 0)


def test_a_dry_run_shows_both(
    tuner: Callable[..., Any], data: Path, space: Path, home: Path
) -> None:
    space.write_text(space.read_text() + "constraints: {latency_ms: 20}\n")
    ended = tuner("search", space, "--data", data, "--dry-run")
    assert ended.code == 0, ended.err
    assert re.search(r"costs of 1 kinds of models take +\d+ s \(", ended.out), ended.out
    assert re.search(r"refused by constraints +not known before costs are measured", ended.out)
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_study_counts_the_time_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, study, home = space(**BOUND), study_in(tmp_path, "s"), open_home(tmp_path / "home")
    state = study.optuna()
    study.record.__dict__["after"] = None
    now = 100.0

    def judge_of(*_: Any) -> Judge:
        nonlocal now
        now += 30
        if shapes_of(of) and unmeasured(state, of):
            keep_costs(state, costs_of(of))
        return Judge(bounds=of.constraints, costs=costs_of(of))

    monkeypatch.setattr(tuner.session, "judge_of", judge_of)
    session: Any = type("Session", (), {"home": home, "console": Console(quiet=True)})()
    meter = DeviceMeter(state, devices=0.5, clock=lambda: now)
    context: Any = None
    assert len(unmeasured(state, of)) == 3
    tuner.session._judge(session, study, of, context, CPU, meter)
    assert meter.sums() == {COSTS: 30.0}, "a whole worker, whatever a trial takes"
    assert busy_seconds({COSTS: 30.0, FEATURES: 1.0}) == 31.0
    learned = read_calibration(home.root)
    assert learned.line(costs_key("2 cores")) is not None
    assert ahead_of(of, calibration=learned).known
    assert unmeasured(state, of) == []
    tuner.session._judge(session, study, of, context, CPU, meter)
    assert meter.sums() == {COSTS: 30.0}, "nothing was measured"


def test_a_measurement_that_fails_is_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, study, home = space(**BOUND), study_in(tmp_path, "s"), open_home(tmp_path / "home")

    study.record.__dict__["after"] = None

    def judge_of(*_: Any) -> Judge:
        raise InputError("no configuration keeps them")

    monkeypatch.setattr(tuner.session, "judge_of", judge_of)
    session: Any = type("Session", (), {"home": home, "console": Console(quiet=True)})()
    meter = DeviceMeter(study.optuna(), devices=1.0)
    context: Any = None
    with pytest.raises(InputError, match="no configuration"):
        tuner.session._judge(session, study, of, context, CPU, meter)
    assert COSTS in meter.sums()
