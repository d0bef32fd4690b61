"""A Ray to work on: one of our own on this machine, or a cluster that is there.

`local` never joins a cluster that happens to run here, and ends with us. How many cohorts run at
once follows the devices: one a GPU; without GPUs one a machine, with all its cores, as a cohort's
matrix products use them all. A fine-tuning trial may have several workers, or a part of a GPU:
then what a trial takes says how many run at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from core.errors import InputError

from ..addresses import check_cluster, first_line
from ..signals import own_signals

LOCAL = "local"
AUTO = "auto"
"""The cluster that runs on this machine, or that RAY_ADDRESS names."""
DRIVER_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""Read by Ray when it is imported: no result files beside ours, no advertisement; worker groups
looked after every half second in place of every two."""
WORKER_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait must not spin: beside another busy process they would keep the cores
from it, and from each other."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine of a cluster has."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a person wants a fine-tuning trial to have."""

    workers: int = 1
    """Processes that train one trial together."""
    gpus: float | None = None
    """GPUs of each; None: one where there are any."""


ONE_WORKER = Share()


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How a study uses a cluster."""

    count: int
    """Cohorts, fine-tuning trials or extraction workers at once."""
    cpus: float
    """Cores of each worker."""
    gpus: float
    """GPUs of each worker."""
    per_trial: int = 1
    """Workers of a trial."""
    machines: tuple[Machine, ...] = ()

    @property
    def num_threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def memory_share(self) -> float:
        """A worker's share of its GPU's memory; without GPUs, of its machine's."""
        if self.gpus:
            return min(1.0, self.gpus)
        return min(1.0, self.cpus / max((m.cpus for m in self.machines), default=self.cpus))

    def for_trials(self, share: Share) -> Workers:
        """The same machines, shared out among fine-tuning trials.

        Without GPUs a trial has one machine's cores, divided among its workers, and several
        machines if it has more workers than that has cores. Raises InputError if not even one
        trial fits.
        """
        gpus = self.gpus if share.gpus is None else share.gpus
        if gpus:
            places = [_gpu_places(machine.gpus, gpus) for machine in self.machines]
            pairs = [(m.cpus, n) for m, n in zip(self.machines, places, strict=True) if n]
            cpus = max(1, min((int(c / n) for c, n in pairs), default=1))
        else:
            usable = [int(machine.cpus) for machine in self.machines if machine.cpus >= 1]
            cpus = max(1, min(usable, default=1) // share.workers)
            places = [int(machine.cpus) // cpus for machine in self.machines]
            if share.workers == 1:
                places = [min(1, n) for n in places]
        # A worker group that waits for cores while its trial runs would wait for ever.
        fitting = [min(n, int(m.cpus) // cpus) for n, m in zip(places, self.machines, strict=True)]
        count = sum(fitting) // share.workers
        if not count:
            raise _too_little(share, gpus, self.machines)
        return replace(
            self, count=count, cpus=float(cpus), gpus=float(gpus), per_trial=share.workers
        )


def check_share(share: Share, *, finetunes: bool) -> None:
    """What is wrong with `--workers-per-trial` and `--gpus-per-worker` alone; `finetunes`: the
    study has fine-tuning trials. Raises InputError."""
    if share.workers < 1:
        raise InputError(
            f"a trial needs a worker, but got {share.workers}", where="--workers-per-trial"
        )
    if share.workers > 1 and not finetunes:
        raise InputError(
            "workers are for fine-tuning: probes share one pass and need no further ones",
            where=f"--workers-per-trial {share.workers}",
            hint="leave it out, or use a space with mode: finetune",
        )
    if share.gpus is None:
        return
    where = f"--gpus-per-worker {share.gpus:g}"
    if not 0 <= share.gpus < float("inf"):
        raise InputError("a worker has 0 GPUs or more", where=where)
    if share.gpus != int(share.gpus):
        if share.gpus > 1:
            raise InputError("only one GPU can be shared: a fraction is less than 1", where=where)
        if share.workers > 1:
            raise InputError(
                "a part of a GPU is for trials of one worker",
                where=where,
                hint=f"whole GPUs with --workers-per-trial {share.workers}",
            )


def _gpu_places(available: float, each: float) -> int:
    """Workers that a machine's GPUs hold. A part of a GPU is a part of one."""
    return int(available) * int(1 / each) if each < 1 else int(available / each)


def _too_little(share: Share, gpus: float, machines: tuple[Machine, ...]) -> InputError:
    cores = sum(int(machine.cpus) for machine in machines)
    found = f"{cores} cores and {sum(m.gpus for m in machines):g} GPUs"
    wanted = f"--workers-per-trial {share.workers}"
    if share.gpus is not None:
        wanted += f" --gpus-per-worker {share.gpus:g}"
    each = f"{gpus:g} GPUs" if gpus else "a core"
    return InputError(
        f"no trial would fit: it takes {share.workers} times {each}, and the cluster has {found} "
        f"on {len(machines)} machines",
        where=wanted,
        hint="fewer workers or GPUs, or a larger cluster (--address)",
    )


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
        with own_signals():
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


def local_threads() -> int:
    """Threads of the one worker of a Ray of our own on this machine, without GPUs."""
    from ray._private.utils import get_num_cpus

    return max(1, int(get_num_cpus()))


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
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    machines = tuple(
        Machine(cpus=float(r.get("CPU", 0)), gpus=float(r.get("GPU", 0)))
        for r in resources
        if isinstance(r, dict)
    )
    gpus = sum(machine.gpus for machine in machines)
    if gpus >= 1:
        per_gpu = min(m.cpus / m.gpus for m in machines if m.gpus >= 1)
        cpus = float(max(1, int(per_gpu)))
        return Workers(count=int(gpus), cpus=cpus, gpus=1.0, machines=machines)
    usable = [machine.cpus for machine in machines if machine.cpus >= 1]
    if not usable:
        raise InputError(
            f"no machine has a core to spare ({len(machines)} are there)",
            where=f"--address {address}",
            hint="add a worker (ray start --address HOST:PORT)",
        )
    return Workers(count=len(usable), cpus=float(int(min(usable))), gpus=0.0, machines=machines)
