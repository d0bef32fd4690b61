"""A cohort: trials of a round, trained together in one Ray Tune trial.

A Tune trial's worker is reused for the next cohort, and trains in its own process (Ray Train's
local mode, `num_workers=0`): a worker group of its own would cost more than most cohorts train.
Reports go to the driver with `tune.report`, which returns when the driver has read them; its
answer waits in the channel. Nothing here knows Optuna or MLflow.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from core.config import TrialConfig
from core.errors import InputError, NoRoomError
from core.report import CohortReport, Metrics, Outcome, Status

from .channel import ChannelHandle
from .context import Context, prepare_worker

if TYPE_CHECKING:
    from core.probing.group import Source
    from core.probing.kept_inputs import KeptInputs

REPORT_SECONDS = 1.0
"""Between rungs a cohort reports at most this often, for the live table."""
STATE_FILE_MODE = 0o644


def run_cohort(job: Mapping[str, Any], context: Context, channel: ChannelHandle) -> None:
    """The trainable of Ray Tune: trains a cohort, delivers one `Outcome` a trial.

    `job` is Tune's config: `cohort` (its name), `numbers` and `trials` (numbers and settings of
    the trials), `features` (of each trial, view's name -> folder of the matrix that it reads).
    """
    if job["trials"][0]["mode"] != "finetune":
        start_helpers(context)
    from ray import tune
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    name = job["cohort"]
    configs = [TrialConfig.from_dict(values) for values in job["trials"]]
    report = tune_report(name, context, channel, tune.report)

    def train_loop() -> list[Outcome]:
        return train_cohort(
            context, configs, numbers=job["numbers"], features=job["features"], report=report
        )

    # Ray's types leave out that a loop may take and, in local mode, return what it likes.
    trainer: Any = TorchTrainer(
        cast("Callable[[], None]", train_loop), scaling_config=ScalingConfig(num_workers=0)
    )
    try:
        outcomes = trainer.fit().return_value
    except NoRoomError as error:
        # For the driver to raise: its trials have no end yet, and no other could go on either.
        outcomes = error
    except InputError as error:
        # A trial that cannot run is a result; anything else is for Tune to retry.
        outcomes = [Outcome(status=Status.FAILED, reason=str(error)) for _ in configs]
    except Exception as error:
        channel.deliver(name, f"{type(error).__name__}: {error}")
        raise
    channel.deliver(name, outcomes)
    tune.report({"epoch": 0, "places": [], "values": []})


def start_helpers(context: Context) -> None:
    """Have processes start that train a part of the heads, where heads train on a CPU: before this
    one imports torch, which takes as long. The first cohort does not wait for them."""
    import ray

    from core.probing import helper_pool

    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        helper_pool.start_helpers(context.num_threads - 1)


def train_cohort(
    context: Context,
    configs: Sequence[TrialConfig],
    *,
    numbers: Sequence[int],
    features: Sequence[Mapping[str, str]],
    report: CohortReport,
    keep_state: bool = False,
    last_epoch: int | None = None,
) -> list[Outcome]:
    """Train trials together: probes in stacks, or one fine-tuning trial.

    A fine-tuned trial's weights go to `context.state_path`, as they are big; a probe's come back
    with its outcome if `keep_state`. `features` holds, of each trial, the folder of each view's
    matrix, those at least that it draws from. `last_epoch` ends them there and keeps that epoch's
    weights, as for `core.probing.probe.train_mixed_probes`. Raises InputError for trials that
    cannot run.
    """
    import torch

    from core.images.views import PLAIN
    from core.probing.probe import train_mixed_probes

    device = prepare_worker(context)
    if configs[0].mode == "finetune":
        from .finetuning import finetune_trial

        (config,), (number,) = configs, numbers
        pictures = open_matrix(features[0][PLAIN.name])

        def report_one(epoch: int, metrics: Metrics) -> bool:
            return bool(report(epoch, {0: metrics}))

        outcome = finetune_trial(
            context,
            config,
            number,
            pictures,
            report=report_one,
            device=device,
            last_epoch=last_epoch,
        )
        return [outcome]
    sources, source_of = sources_of(configs, features)
    return train_mixed_probes(
        sources,
        source_of,
        torch.from_numpy(context.table.targets_NC).float(),
        context.split.pairs(),
        configs,
        objective=context.objective,
        report=report,
        order_seed=context.seed,
        precision=context.precision,
        device=device,
        keep_state=keep_state,
        last_epoch=last_epoch,
        kept=_kept_inputs(),
    )


@functools.cache
def _kept_inputs() -> KeptInputs:
    """What this worker scaled for its latest cohort."""
    from core.probing.kept_inputs import KeptInputs

    return KeptInputs()


def sources_of(
    configs: Sequence[TrialConfig], features: Sequence[Mapping[str, str]]
) -> tuple[list[Source], list[int]]:
    """The features that trials read, each once, and which of them each trial reads; `features` as
    for `train_cohort`."""
    from core.images.views import PLAIN, VIEWS
    from core.probing.group import Source

    drawn: dict[str, dict[str, str]] = {}
    for config, folders in zip(configs, features, strict=True):
        views = drawn.setdefault(folders[PLAIN.name], {})
        views |= {view.name: folders[view.name] for view in VIEWS[config.views]}
    sources = [
        Source(
            features=open_matrix(plain),
            further_views={
                name: open_matrix(folder) for name, folder in views.items() if name != PLAIN.name
            },
        )
        for plain, views in drawn.items()
    ]
    plains = list(drawn)
    return sources, [plains.index(folders[PLAIN.name]) for folders in features]


def open_matrix(folder: str) -> npt.NDArray[Any]:
    """The feature or pixel matrix in a cache folder, memory-mapped and read-only."""
    return np.lib.format.open_memmap(Path(folder) / "matrix.npy", mode="r")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state dict, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in state.items()}, draft)
    draft.chmod(STATE_FILE_MODE)
    draft.replace(path)


def fold_values_of(metrics: Metrics, key: str) -> list[float]:
    """A metric on each fold, first to last; empty where there is one validation part."""
    folds = range(1, len(metrics) + 1)
    names = itertools.takewhile(metrics.__contains__, (f"{key}_fold_{k}" for k in folds))
    return [metrics[name] for name in names]


def tune_report(
    name: str, context: Context, channel: ChannelHandle, send: Callable[[dict[str, Any]], None]
) -> CohortReport:
    """At rungs the driver is asked which trials stop; between them it only hears, now and then."""
    last = 0.0
    key = f"validation_{context.objective}"

    def report(epoch: int, metrics: Mapping[int, Metrics]) -> Collection[int]:
        nonlocal last
        now = time.monotonic()
        if epoch not in context.rungs and now - last < REPORT_SECONDS:
            return ()
        last = now
        # Lists, as Tune takes mappings apart.
        values = [trial[key] for trial in metrics.values()]
        by_fold = [fold_values_of(trial, key) for trial in metrics.values()]
        folds = {"folds": by_fold} if any(by_fold) else {}
        send({"epoch": epoch, "places": list(metrics), "values": values, **folds})
        return channel.ruling(name, epoch) if epoch in context.rungs else ()

    return report
