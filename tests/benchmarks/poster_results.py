"""Results of many configurations of the shipped space `probe` on the real posters, for
`bench_search_quality.py` to look up: `python poster_results.py FILE --minutes 60`.

Every configuration is trained to its last epoch by our own stacks on the cached features, without a
pruner. One round draws at random, the next asks TPE, so that the region where searches end is
known, too (Eggensperger et al. 2015). FILE (JSON lines) grows until the time is up; a further run
adds to it. More pictures validate than train: quick, and smoother an objective than a search's.
Needs POSTERS_DIR and WEIGHTS_DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Bench, console, poster_table, weights_at_hand

SPACE = "probe"
ROUND = 96
"""Trials of a round: the more, the more share a stack."""


def features_of(bench: Bench, folder: Path, num_pictures: int) -> tuple[dict[str, Any], Any]:
    """Feature matrices by backbone, kept under `folder`, and the table of the pictures."""
    from core.encoding.encoders import build_encoder
    from core.encoding.features import (
        compute_features,
        describe_features,
        feature_shape,
        feature_store,
    )
    from core.images.pixels import PixelSpec, PixelStore
    from core.precision import inference_precision
    from tuner.spaces.space import load_space

    table, _ = poster_table(bench, num_pictures)
    weights, weights_dir, _ = weights_at_hand()
    matrices = {}
    for name in load_space(SPACE).parameters["backbone"].branches[0].domain.values() or ():
        assert isinstance(name, str)
        encoder = build_encoder(name, weights=weights, weights_dir=weights_dir)
        precision = inference_precision("cpu")
        pictures = f"first {num_pictures}"
        spec = describe_features(encoder, pictures=pictures, pooling="avg", precision=precision)
        shape = feature_shape(encoder, "avg")
        store = feature_store(folder, spec, num_images=num_pictures, row_shape=shape)
        size, resize = spec.input_size, spec.resize
        pixels = PixelStore(
            folder,
            PixelSpec(pictures=pictures, input_size=size, resize=resize),
            list(table.paths),
        )
        compute_features(
            encoder,
            store,
            pooling="avg",
            precision=precision,
            pictures_of=pixels.fetch,
            shards=store.missing_shards(),
        )
        console.print(f"features of {name}: {store.shape}")
        matrices[name] = np.load(store.folder / "matrix.npy", mmap_mode="r")
    return matrices, table


def add_round(
    study: Any, matrices: dict[str, Any], table: Any, fold: tuple[Any, Any], file: Path
) -> None:
    """Ask for a round, train it, append its results to FILE and tell the study."""
    import torch

    from core.config import TrialConfig
    from core.precision import inference_precision
    from core.probing.probe import train_probes
    from core.report import Status
    from tuner.spaces.space import load_space

    space = load_space(SPACE)
    trials = [study.ask() for _ in range(ROUND)]
    by_backbone = defaultdict(list)
    for trial in trials:
        settings = space.suggest(trial) | {"seed": trial.number}
        by_backbone[settings["backbone"]].append((trial, TrialConfig.from_dict(settings)))
    for backbone, members in by_backbone.items():
        outcomes = train_probes(
            np.ascontiguousarray(matrices[backbone]),
            torch.from_numpy(table.targets_NC).float(),
            [fold],
            [config for _, config in members],
            precision=inference_precision("cpu"),
        )
        with file.open("a") as lines:
            for (trial, _), outcome in zip(members, outcomes, strict=True):
                curve = [epoch["validation_top3_accuracy"] for epoch in outcome.curve]
                if outcome.status is Status.COMPLETE:
                    study.tell(trial, max(curve))
                else:
                    study.tell(trial, state=_failed())
                lines.write(json.dumps({"params": trial.params, "curve": curve}) + "\n")


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def main() -> None:
    import optuna

    from tuner.sampling.samplers import SamplerSpec, build_sampler
    from tuner.spaces.space import load_space

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSON lines, outside of the repository")
    parser.add_argument("--train", type=int, default=500, help="pictures trained on")
    parser.add_argument("--validate", type=int, default=800, help="pictures validated on")
    parser.add_argument("--pictures", type=int, default=2400, help="pictures with features")
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    for name in ("POSTERS_DIR", "WEIGHTS_DIR"):
        if name not in os.environ:
            raise SystemExit(f"{name} is not set")
    ends = time.monotonic() + 60 * arguments.minutes
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(name=SPACE, quick=False, json=None, scratch=Path(scratch), figures={})
        cache = arguments.file.parent / "cache"
        matrices, table = features_of(bench, cache, arguments.pictures)
    space = load_space(SPACE)
    rows = np.random.default_rng(0).permutation(table.num_images)
    validation = rows[arguments.train : arguments.train + arguments.validate]
    fold = (np.sort(rows[: arguments.train]), np.sort(validation))
    seed = int(time.time())  # A further run must not draw the same configurations again.
    study = optuna.create_study(direction="maximize")
    while time.monotonic() < ends:
        kind = "tpe" if len(study.trials) // ROUND % 2 else "random"
        study.sampler = build_sampler(SamplerSpec(name=kind), space, seed + len(study.trials))
        add_round(study, matrices, table, fold, arguments.file)
        best = study.best_value if study.best_trials else float("nan")
        console.print(f"{len(study.trials)} trials, best {best:.4f}, last round {kind}")


if __name__ == "__main__":
    main()
