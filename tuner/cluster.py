"""A Ray to work on: one of our own on this machine, or a cluster that is there.

`local` never joins a cluster that happens to run here, and ends with us. How many cohorts run at
once follows the devices: one a GPU; without GPUs one a machine, with all its cores, as a cohort's
matrix products use them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import InputError

from .addresses import check_cluster, first_line

LOCAL = "local"
AUTO = "auto"
"""The cluster that runs on this machine, or that RAY_ADDRESS names."""
DRIVER_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read by Ray when it is imported: no result files beside ours, no advertisement."""
WORKER_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait must not spin: beside another busy process two spinning threads made a step
of a stack three times as slow (85 against 33 ms) as two that sleep."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How a study uses a cluster."""

    count: int
    """Cohorts, or extraction workers, at once."""
    cpus: float
    """Cores of each."""
    gpus: float
    """GPUs of each: 1 or 0."""

    @property
    def num_threads(self) -> int:
        return max(1, int(self.cpus))


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Workers]:
    """Connect, and leave on exit; a Ray of our own is stopped.

    Raises InputError if no cluster answers at the address.
    """
    check_address(address)
    for name, value in (DRIVER_VARIABLES | WORKER_VARIABLES).items():
        os.environ.setdefault(name, value)
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        raise RuntimeError("this process is connected to a Ray already")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == LOCAL else None,
            # Workers of our own Ray inherit our environment.
            runtime_env=None if address == LOCAL else {"env_vars": WORKER_VARIABLES},
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise InputError(
            f"Ray cannot be reached ({first_line(error)})",
            where=f"--address {address}",
            hint="`local` for this machine alone, or HOST:PORT of a cluster's head",
        ) from error
    try:
        yield _workers(ray.nodes(), address)  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raises InputError if no cluster answers there: Ray itself waits two minutes for one."""
    if address == LOCAL:
        return
    found: str | None = address
    if address == AUTO:
        from ray._private.services import canonicalize_bootstrap_address

        try:
            found = canonicalize_bootstrap_address(AUTO)
        except (ConnectionError, ValueError) as error:
            raise InputError(
                "no Ray runs on this machine",
                where=f"--address {address}",
                hint="start one (ray start --head), or leave the flag out",
            ) from error
    if found is not None:
        check_cluster(found)


def _workers(nodes: list[dict[str, object]], address: str) -> Workers:
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [float(r.get("CPU", 0)) for r in alive if isinstance(r, dict)]
    gpus = [float(r.get("GPU", 0)) for r in alive if isinstance(r, dict)]
    if sum(gpus) >= 1:
        per_gpu = min(c / g for c, g in zip(cpus, gpus, strict=True) if g >= 1)
        return Workers(count=int(sum(gpus)), cpus=float(max(1, int(per_gpu))), gpus=1.0)
    usable = [c for c in cpus if c >= 1]
    if not usable:
        raise InputError(
            f"no machine has a core to spare ({len(alive)} are there)",
            where=f"--address {address}",
            hint="add a worker (ray start --address HOST:PORT)",
        )
    return Workers(count=len(usable), cpus=float(int(min(usable))), gpus=0.0)
