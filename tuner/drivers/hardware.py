"""On which hardware the models of a study are timed: latencies of unlike machines do not compare.

Where latency counts, the first driver keeps the name of its workers' hardware with the study, and
a joiner whose workers have another is refused before it takes a trial.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError

if TYPE_CHECKING:
    from ..spaces.space import SearchSpace
    from ..studies.study import Study
    from ..trials.cluster import Workers

HARDWARE = "hardware"
"""Optuna study attribute: `hardware_of` the workers that timed its models."""
CPU_INFO = Path("/proc/cpuinfo")


def keep_hardware(study: Study, space: SearchSpace, workers: Workers) -> None:
    """The first driver: note the hardware, before anything is timed. The first note stays, as
    each kind of model is timed once."""
    state = study.optuna()
    if latency_counts(space) and HARDWARE not in state.user_attrs:
        state.set_user_attr(HARDWARE, hardware_of(workers))


def check_hardware(study: Study, space: SearchSpace, workers: Workers) -> None:
    """A joiner: raises InputError if latency counts and its workers have other hardware than
    those that the study's models are timed on."""
    if not latency_counts(space):
        return
    there, here = study.optuna().user_attrs.get(HARDWARE), hardware_of(workers)
    if there == here:
        return
    known = f"on {there}" if there else "by a version that did not note on what"
    raise InputError(
        f"the latency of its models was measured {known}, and this is {here}: the latencies of "
        "unlike machines cannot be compared",
        where=f"study {study.record.name}",
        hint="join from a machine of the same kind; or search a space without latency_ms",
    )


def latency_counts(space: SearchSpace) -> bool:
    """Whether latency is an objective, or bounded. Both parts of a space have the same goals."""
    return "latency_ms" in space.costs


def hardware_of(workers: Workers) -> str:
    """What one worker computes on: asked there, as the driver's own machine may be another."""
    import ray

    task: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(describe)
    return f"{ray.get(task.remote(bool(workers.gpus)))}, {workers.num_threads} threads"


def describe(has_gpu: bool) -> str:
    """This process' GPU, if it is given one, and its machine's CPU."""
    if not has_gpu:
        return cpu_model()
    import torch

    return f"{torch.cuda.get_device_name()}, {cpu_model()}"


def cpu_model() -> str:
    """As the maker calls it; where the system does not say, the architecture."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine()
