"""At the end of a probe part: the heads of the best probes, kept for fine-tuning to start from.

A probe's weights are not kept while thousands are searched. So the best probe of each structure
that the fine-tuning space holds is trained once more on its cached features: seconds, and with the
same seed the same head. An index says which probe each kept head is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrialConfig
from core.encoding.shards import write_json
from core.images.views import PLAIN
from core.report import keep_going

from ..spaces.space import SearchSpace
from ..studies.seeds import best_probes
from ..studies.study import TrialRecord
from .cluster import Workers
from .cohort import open_matrix, save_state, train_cohort
from .context import Context, FeatureRequest, request_of, view_folders
from .head_start import FOLDER, head_path, head_structure
from .searcher import trial_seed

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
READ = ("backbone", "head", "hidden_sizes", "pooling", "blocks", "image_size", "head_start")
"""Settings that decide from which head a trial starts, and whether it wants one."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The best probe of a structure."""

    number: int
    config: TrialConfig
    features: Mapping[str, str]
    """View's name -> folder of its feature matrix."""


def keep_heads(
    folder: Path,
    space: SearchSpace,
    trials: Sequence[TrialRecord],
    features: Mapping[FeatureRequest, str],
    context: Context,
    workers: Workers,
) -> list[str]:
    """Train and keep the heads that trials of a fine-tuning space may start from.

    Those that are kept already stay, unless a better probe has come since.

    Args:
        folder: of the fine-tuning study.
        space: the fine-tuning space.
        trials: all trials of the probe part.
        features: folder of each matrix that they read.
        context: the probe part's.

    Returns:
        The structures without a complete probe: their heads start at random.
    """
    import ray

    wanted = wanted_structures(space)
    probes: dict[str, Probe] = {}
    for trial in best_probes(trials):
        settings = {"seed": trial_seed(context.seed, trial.number), **trial.settings}
        config = TrialConfig.from_dict(settings)
        key = head_path(folder, config).stem
        if key in wanted and key not in probes:
            matrices = view_folders(features, request_of(config))
            probes[key] = Probe(number=trial.number, config=config, features=matrices)
    index_path = folder / FOLDER / INDEX
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    new = [probe for key, probe in probes.items() if index.get(key) != probe.number]
    if new:
        job: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(train_heads)
        trained = ray.get(job.remote(context, new, folder))
        index |= {key: probe.number for key, probe in probes.items() if probe.number in trained}
        index_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(index_path, index)
    return sorted(label for key, label in wanted.items() if key not in index)


def wanted_structures(space: SearchSpace) -> dict[str, str]:
    """The heads that some trial of a fine-tuning space may start from: key -> label."""
    found = {}
    for values in space.assignments(READ):
        if values.get("head_start") == "probe":
            settings: dict[str, Any] = {name: values[name] for name in READ if name in values}
            config = TrialConfig(**settings, mode=space.mode)
            words = [str(part) for part in head_structure(config) if part != []]
            found[head_path(Path(), config).stem] = " ".join(words)
    return found


def train_heads(context: Context, probes: Sequence[Probe], folder: Path) -> set[int]:
    """Train probes once more and keep their heads in `folder`. Runs in a worker.

    Returns the numbers of those that could be: another device may make one diverge.
    """
    trained = set()
    # One backbone's features after another's, as a cohort holds all that it reads in memory.
    groups: dict[FeatureRequest, list[Probe]] = defaultdict(list)
    for probe in probes:
        groups[request_of(probe.config)].append(probe)
    for members in groups.values():
        outcomes = train_cohort(
            context,
            [probe.config for probe in members],
            numbers=[probe.number for probe in members],
            features=[probe.features for probe in members],
            report=keep_going,
            keep_state=True,
        )
        for probe, outcome in zip(members, outcomes, strict=True):
            if outcome.state is not None:
                state = {**outcome.state, **_scaling(context, probe)}
                save_state(head_path(folder, probe.config), state)
                trained.add(probe.number)
    return trained


def _scaling(context: Context, probe: Probe) -> dict[str, Tensor]:
    """The feature scaling that the probe read through."""
    import torch

    from core.encoding.inputs import feature_statistics

    matrix = open_matrix(probe.features[PLAIN.name])
    if probe.config.feature_norm == "none":
        size = int(matrix.shape[-1])
        return {"mean_D": torch.zeros(size), "deviation_D": torch.ones(size)}
    train, _ = context.split.pairs()[0]
    mean_D, deviation_D = feature_statistics(matrix, train)
    return {"mean_D": mean_D, "deviation_D": deviation_D}
