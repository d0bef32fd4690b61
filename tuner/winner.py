"""The end of a study: finalists are trained again, the winner is logged and registered."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.errors import InputError
from core.report import Status
from core.shards import write_json

from .channel import start_channel
from .cluster import Workers
from .context import Context, FeatureRequest, request_of, view_folders
from .finalists import MAILBOX, Candidate, Winner, crown
from .searcher import trial_seed
from .space import SearchSpace
from .steps import showing_steps
from .study import Study, TrialRecord, trial_records
from .tracking import Tracker

if TYPE_CHECKING:
    from rich.console import Console

NUM_FINALISTS = 5
NUM_SEEDS = 3
ALIAS = "challenger"
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a study came to."""

    winner: Winner
    trials: tuple[TrialRecord, ...]
    model_uri: str
    """`models:/NAME@challenger`."""
    version: str
    """Of the registered model."""


def crown_and_register(
    study: Study,
    space: SearchSpace,
    context: Context,
    workers: Workers,
    features: Mapping[FeatureRequest, str],
    tracker: Tracker,
    console: Console,
) -> Result:
    """Choose the winner among the best trials, score it on test, log and register its model.

    Raises InputError if no trial was completed.
    """
    trials = tuple(trial_records(study.optuna(), space))
    candidates = best_candidates(trials, features, study.record.seed)
    if not candidates:
        raise InputError(
            f"none of {len(trials)} trials was completed, so there is no winner",
            where=f"study {study.record.name}",
            hint=f"see why: tuner trials {study.record.name}",
        )
    winner = _crown(context, workers, candidates, console)
    write_json(study.folder / "winner.json", dataclasses.asdict(winner))
    with console.status("logging and registering the model"):
        version = _register(study, winner, tracker)
    uri = f"models:/{study.record.model}@{ALIAS}"
    return Result(winner=winner, trials=trials, model_uri=uri, version=version)


def _crown(
    context: Context, workers: Workers, candidates: Sequence[Candidate], console: Console
) -> Winner:
    import ray

    channel = start_channel()
    job: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(crown)
    running = job.remote(context, candidates, NUM_SEEDS, channel)
    step = f"best {len(candidates)} again, {NUM_SEEDS} seeds"
    with showing_steps(console) as steps:
        while True:
            ready, _ = ray.wait([running], timeout=POLL_SECONDS)
            for done, total in channel.collect(MAILBOX):
                steps(f"{step}: epoch", done, total)
            if ready:
                winner: Winner = ray.get(running)
                return winner


def best_candidates(
    trials: tuple[TrialRecord, ...], features: Mapping[FeatureRequest, str], seed: int
) -> list[Candidate]:
    """The complete trials of highest value, best first; of equals, the earlier."""
    complete = [t for t in trials if t.status == Status.COMPLETE and t.value is not None]
    complete.sort(key=lambda t: (-(t.value or 0.0), t.number))
    candidates = []
    for trial in complete[:NUM_FINALISTS]:
        config = TrialConfig.from_dict({"seed": trial_seed(seed, trial.number), **trial.settings})
        candidates.append(
            Candidate(
                number=trial.number,
                config=config,
                value=trial.value or 0.0,
                features=view_folders(features, request_of(config)),
            )
        )
    return candidates


def _register(study: Study, winner: Winner, tracker: Tracker) -> str:
    from .packaging import log_model

    scores = {k: v for k, v in winner.evaluation.items() if isinstance(v, float)}
    tags = {
        "tuner.winner": winner.number,
        "tuner.optimism": f"{winner.optimism:.4f}",
        "tuner.learnt_nothing": str(winner.learnt_nothing).lower(),
    }
    test_scores = {f"test_{name}": value for name, value in scores.items()}
    tracker.log_study({**test_scores, "optimism": winner.optimism}, tags)
    tracker.mark_winner(winner.number)
    tracker.log_artifacts([study.folder / "winner.json"])
    tracker.flush()
    info = log_model(
        Path(winner.folder),
        run_id=tracker.parent_run_id,
        registered_name=study.record.model,
        input_example_bytes=example_picture(),
        tracking_uri=tracker.tracking_uri,
        alias=ALIAS,
        tags={"tuner.study": study.record.name, **{k: str(v) for k, v in tags.items()}},
    )
    return info.version


def example_picture() -> bytes:
    """A small drawn JPEG: an example of the input that shows nobody's picture."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((40, 60)).convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    return stream.getvalue()
