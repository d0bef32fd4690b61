"""The end of a study: finalists are trained again, the winner is logged and registered."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.encoding.shards import write_json
from core.errors import InputError
from core.report import Status

from ..budgets.device_time import DeviceMeter, metered
from ..spaces.space import SearchSpace
from ..studies.study import Study, TrialRecord, trial_records
from ..tracking.tracker import Tracker
from ..trials.cluster import ONE_WORKER, Share, Workers
from ..trials.context import Context, FeatureRequest, request_of, view_folders
from ..trials.searcher import trial_seed
from .choice import chosen
from .crown import AS_USUAL, NUM_FINALISTS, FinalistOptions, Winner, crown
from .ray_runner import RayRunner
from .repeats import Candidate, Runner

if TYPE_CHECKING:
    from rich.console import Console

ALIAS = "challenger"


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
    *,
    rivals: Sequence[Candidate] = (),
    options: FinalistOptions = AS_USUAL,
    share: Share = ONE_WORKER,
    meter: DeviceMeter | None = None,
) -> Result:
    """Choose the winner among the best trials, score it on test, log and register its model.

    Args:
        features: folder of each matrix that the study's trials read.
        rivals: candidates of the other part of a two-stage study (`best_candidates` of it); they
            compete for the same places. Their trials read the same table, split and objective.
        options: how many are trained again, and what is made of them.
        share: what a fine-tuning takes of the cluster.
        meter: counts what the finalists take of devices.

    Raises InputError if no trial was completed.
    """
    trials = tuple(trial_records(study.optuna(), space))
    candidates = [
        *best_candidates(
            chosen(trials, study.record.name, options),
            features,
            study.record.seed,
            study=study.record.name,
            count=options.count,
        ),
        *rivals,
    ]
    candidates.sort(key=lambda c: (-c.value, c.study, c.number))
    if options.pick is not None:
        options = replace(options, ensemble=None)  # That trial is wanted, and nothing beside it.
    if not candidates:
        raise InputError(
            f"none of {len(trials)} trials was completed and may win, so there is no winner",
            where=f"study {study.record.name}",
            hint=f"see why: tuner trials {study.record.name}",
        )
    run: Runner = RayRunner(context, workers, share, console)
    if meter is not None:
        run = metered(run, meter, workers)
    winner = crown(context, candidates[: options.count], options, run, bounds=space.constraints)
    write_json(study.folder / "winner.json", winner.to_dict())
    with console.status("logging and registering the model"):
        version = _register(study, winner, tracker)
    uri = f"models:/{study.record.model}@{ALIAS}"
    return Result(winner=winner, trials=trials, model_uri=uri, version=version)


def best_candidates(
    trials: Sequence[TrialRecord],
    features: Mapping[FeatureRequest, str],
    seed: int,
    *,
    study: str,
    count: int = NUM_FINALISTS,
) -> list[Candidate]:
    """The complete trials of highest value, best first; of equals, the earlier.

    Args:
        trials: of the study.
        features: folder of each matrix that they read.
        seed: the study's.
        study: its name.
        count: how many at most.
    """
    complete = [t for t in trials if t.status == Status.COMPLETE and t.value is not None]
    complete.sort(key=lambda t: (-(t.value or 0.0), t.number))
    candidates = []
    for trial in complete[:count]:
        config = TrialConfig.from_dict({"seed": trial_seed(seed, trial.number), **trial.settings})
        candidates.append(
            Candidate(
                study=study,
                number=trial.number,
                config=config,
                value=trial.value or 0.0,
                features=view_folders(features, request_of(config)),
            )
        )
    return candidates


def _register(study: Study, winner: Winner, tracker: Tracker) -> str:
    from ..tracking.packaging import log_model

    tags = winner_tags(winner)
    tracker.log_study(winner_metrics(winner), tags)
    tracker.mark_winner(winner.number, winner.study)
    tracker.log_artifacts([study.folder / "winner.json"])
    info = tracker.ask(
        lambda: log_model(
            Path(winner.folder),
            run_id=tracker.parent_run_id,
            registered_name=study.record.model,
            input_example_bytes=example_picture(),
            tracking_uri=tracker.tracking_uri,
            alias=ALIAS,
            tags={"tuner.study": study.record.name, **{k: str(v) for k, v in tags.items()}},
        )
    )
    return info.version


def winner_metrics(winner: Winner) -> dict[str, float]:
    """What the parent run shows of the end of a study."""
    metrics = {f"test_{k}": v for k, v in winner.evaluation.items() if isinstance(v, float)}
    metrics |= {
        "optimism": winner.optimism,
        "winner_validation": winner.validation,
        "num_finalists": len(winner.finalists),
    }
    for rank, finalist in enumerate(winner.finalists, 1):
        metrics |= {
            f"finalist_{rank}_mean": finalist.mean,
            f"finalist_{rank}_spread": finalist.spread,
            f"finalist_{rank}_in_search": finalist.value,
        }
    if winner.ensemble is not None:
        metrics["ensemble_single"] = winner.ensemble.single
        if winner.ensemble.estimate is not None:
            metrics["ensemble_estimate"] = winner.ensemble.estimate
    if winner.refit is not None:
        metrics["refit_num_images"] = winner.refit.num_images
    return metrics


def winner_tags(winner: Winner) -> dict[str, Any]:
    """The same in words, on the parent run and on the model's version."""
    tags: dict[str, Any] = {
        "tuner.winner": winner.number,
        "tuner.winner_study": winner.study,
        "tuner.finalists": ", ".join(finalist.label for finalist in winner.finalists),
        "tuner.optimism": f"{winner.optimism:.4f}",
        "tuner.learnt_nothing": str(winner.learnt_nothing).lower(),
        "tuner.model": "single",
    }
    if winner.ensemble is not None:
        tags["tuner.ensemble_weights"] = json.dumps(winner.ensemble.weights)
        if winner.ensemble.registered:
            tags["tuner.model"] = "ensemble"
    if winner.refit is not None:
        tags["tuner.refit_epochs"] = json.dumps(winner.refit.epochs)
    return tags


def example_picture() -> bytes:
    """A small drawn JPEG: an example of the input that shows nobody's picture."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((40, 60)).convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    return stream.getvalue()
