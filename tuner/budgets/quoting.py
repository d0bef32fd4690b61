"""From a study that is about to run to its quote: what is cached, what must be measured first.

Nothing is written but `quote.json` in the study's folder, once a study starts: what a person was
told then is held against the truth at its end.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.data.split import Split
from core.data.table import Table
from core.encoding.features import PIXELS, feature_shape
from core.encoding.shards import write_json
from core.precision import inference_precision

from ..finalists.crown import FinalistOptions
from ..goals.costs import Costs, Shape, read_costs, shapes_of
from ..goals.judge import affordable
from ..home import Home
from ..signals import interruption
from ..spaces.space import SearchSpace
from ..studies.parts import studies_of
from ..studies.plan import Plan
from ..trials.cluster import ONE_WORKER, Share, Workers
from ..trials.context import FeatureRequest
from .calibration import Calibration, read_calibration
from .device_time import WALL, DeviceMeter, busy_seconds, devices_of_trial, used_by
from .encoder_speeds import look_at_encoders, measure_encoder
from .model_costs import costs_ahead, trained
from .prices import Features
from .quote import Crew, Part, Quote, draw_configs, make_quote
from .quote_view import FILE, quote_line
from .speed_test import MOST_SECONDS, Stopwatch, measure_heads
from .speeds import (
    SESSION,
    device_name,
    keep_notes,
    rows_an_epoch,
    threads_of,
    training_key,
)

if TYPE_CHECKING:
    from ..session import Session
    from ..studies.study import Study

START_SECONDS = 3.0
"""A start that nobody asked a quote of measures for so long at most."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be quoted: a study's parts on a table."""

    home: Home
    table: Table
    split: Split
    parts: tuple[tuple[SearchSpace, Plan, int], ...]
    """Of each its space, its plan, and how many of its trials have ended."""
    options: FinalistOptions
    weights: str
    weights_dir: Path | None
    workers: Workers
    share: Share = ONE_WORKER
    used: float = 0.0
    """Device seconds that the study has used already."""
    costs: tuple[Mapping[Shape, Costs], ...] = ()
    """Of each part that has begun: what its study has measured of its models."""


def quote_of(subject: Subject, *, measure_seconds: float = MOST_SECONDS) -> Quote:
    """The quote, by what earlier studies of the home showed and, for what they did not, by a
    measurement of `measure_seconds` at most."""
    calibration = read_calibration(subject.home.root)
    precision = inference_precision("cuda" if subject.workers.gpus else "cpu")
    watch = Stopwatch(seconds=measure_seconds)
    parts = [_part(subject, place, calibration) for place in range(len(subject.parts))]
    known: dict[FeatureRequest, Features] = {}
    shapes: dict[FeatureRequest, tuple[int, ...]] = {}
    plans = [part.plan for part in parts]
    for encoder, features in look_at_encoders(subject, plans, precision):
        known |= {one.request: one for one in features}
        for one in features:
            if one.request.pooling != PIXELS:
                request = one.request
                shapes[request] = feature_shape(encoder, request.pooling, request.blocks)
        notes = measure_encoder(
            encoder, features, parts, subject, precision, calibration, watch
        )  # fmt: skip
        calibration = calibration.with_notes(notes)
    heads = [
        config
        for part in parts
        if part.space.mode == "probe"
        for config in part.configs
        if calibration.number(training_key(part.trainers.device, precision, config)) is None
    ]
    notes = measure_heads(
        heads,
        shapes,
        num_classes=subject.table.num_classes,
        device=device_name(subject.workers),
        precision=precision,
        watch=watch,
    )
    return make_quote(
        [
            replace(part, features=tuple(known[request] for request in part.plan.requests))
            for part in parts
        ],
        subject.options,
        calibration.with_notes(notes),
        precision=precision,
        rows=rows_an_epoch(subject.split),
        used=subject.used,
    )


def this_machine() -> Workers:
    """How a Ray of our own would use this machine: what a dry run quotes for."""
    import torch

    from ..trials.cluster import Machine

    cpus, gpus = float(os.cpu_count() or 1), float(torch.cuda.device_count())
    machine = Machine(cpus=cpus, gpus=gpus)
    if not gpus:
        return Workers(count=1, cpus=cpus, gpus=0.0, machines=(machine,))
    each = float(max(1, int(cpus / gpus)))
    return Workers(count=int(gpus), cpus=each, gpus=1.0, machines=(machine,))


@contextmanager
def quoted(
    session: Session,
    study: Study,
    plans: tuple[Plan, Plan | None],
    workers: Workers,
    options: FinalistOptions,
    started: float,
) -> Iterator[None]:
    """Say what the study will take, and keep it beside what the block takes.

    `started`: `time.monotonic()` when the session began.
    """
    used = {part.record.name: used_by(part) for part in studies_of(session.home, study)}
    busy_before = sum(busy_seconds(sums) for sums in used.values())
    wall_before = sum(sums.get(WALL, 0.0) for sums in used.values())
    subject = _subject_of(session, study, plans, workers, options, busy_before)
    # On a GPU that would take memory from the workers, and this process may have none.
    measure_seconds = 0.0 if workers.gpus else START_SECONDS
    with session.console.status("estimating how long it will take"):
        quote = quote_of(subject, measure_seconds=measure_seconds)
    session.console.print(quote_line(quote), highlight=False, soft_wrap=True)
    before = {"seconds_before": wall_before, "device_seconds_before": busy_before}
    write_json(study.folder / FILE, quote.to_dict() | before)
    meter = DeviceMeter(study.optuna(), devices=devices_of_trial(workers))
    try:
        yield
    except BaseException as error:
        # What failed may be the storage itself: it is not asked once more then.
        if interruption(error) is not None:
            meter.add(WALL, time.monotonic() - started)
        raise
    meter.add(WALL, time.monotonic() - started)
    wall = meter.sums()[WALL]
    busy = sum(busy_seconds(used_by(part)) for part in studies_of(session.home, study))
    held = (busy - busy_before) / (workers.count * devices_of_trial(workers))
    keep_notes(session.home, session.console, [(SESSION, max(1.0, wall - held))])


def _subject_of(
    session: Session,
    study: Study,
    plans: tuple[Plan, Plan | None],
    workers: Workers,
    options: FinalistOptions,
    used: float,
) -> Subject:
    studies = studies_of(session.home, study)
    ended = [
        sum(trial.state.is_finished() for trial in part.optuna().get_trials(deepcopy=False))
        for part in studies
    ]
    spaces = study.space().parts
    parts = itertools.zip_longest(spaces, plans[: len(spaces)], ended[: len(spaces)], fillvalue=0)
    record = study.record
    return Subject(
        home=session.home,
        table=session.table,
        split=session.split,
        parts=tuple((space, plan, done) for space, plan, done in parts),  # type: ignore[misc]
        options=options,
        weights=record.weights,
        weights_dir=Path(record.weights_dir) if record.weights_dir else None,
        workers=workers,
        share=session.share,
        used=used,
        costs=tuple(read_costs(part.optuna()) for part in studies),
    )


def _part(subject: Subject, place: int, calibration: Calibration) -> Part:
    (space, plan, done), workers = subject.parts[place], subject.workers
    configs = draw_configs(space)
    # The second part takes over what the first one measured.
    measured = {shape: own for known in subject.costs[: place + 1] for shape, own in known.items()}
    before = [shape for earlier, *_ in subject.parts[:place] for shape in shapes_of(earlier)]
    costs = costs_ahead(space, configs, measured, device_name(workers), calibration, before=before)
    if costs.judge is not None:
        plan = affordable(plan, space, costs.judge)
    trainers = workers.for_trials(subject.share) if space.mode == "finetune" else workers
    return Part(
        space=space,
        plan=plan,
        done=done,
        configs=trained(configs, costs),
        costs=costs,
        features=(),
        extractors=_crew(workers),
        trainers=_crew(trainers),
    )


def _crew(workers: Workers) -> Crew:
    return Crew(
        device=device_name(workers),
        threads=threads_of(workers),
        devices=devices_of_trial(workers),
        count=workers.count,
    )
