"""Fine-tuning trials of several workers: Ray Train groups that take trial after trial.

Starting a group takes ten times as long as reading a trial off the board, so a group is started
once and kept for the study. It is driven from a thread of the driver, not from a Tune trial: Tune
may end its trials as it likes, and no group is left behind. A trial stops by the word of its own
loop, on all ranks together; a group ends when the board says so. If a worker dies, Train takes its
group down, the thread starts it anew, and the trial goes on from its checkpoint. A full disk ends
the session.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray

from core.config import TrialConfig
from core.errors import InputError, NoRoomError
from core.images.views import PLAIN
from core.report import Metrics, Outcome, Status

from .channel import ChannelHandle
from .cluster import Workers
from .cohort import open_matrix, tune_report
from .context import Context, prepare_worker
from .finetuning import finetune_trial
from .job_board import COULD_NOT_GO_ON, BoardHandle, Progress

if TYPE_CHECKING:
    import torch

    from core.finetuning.ranks import Ranks

PLACEHOLDER = {"cpu": 0.0, "memory": 1.0}
"""What a Tune trial takes that only stands for a trial of a group: Tune wants something."""
LONE_END_SECONDS = 30.0
"""A rank that could not go on waits so long for the others; then the group is started anew."""
END_SECONDS = 120.0
"""How long the end of a study waits for its groups to be gone."""
INTERRUPTED_SECONDS = 12.0
"""The same after an interruption: an epoch may be longer than a person wants to wait."""
REASON_LENGTH = 500


def follow_trial(
    job: Mapping[str, Any], context: Context, channel: ChannelHandle, board: BoardHandle
) -> None:
    """The trainable of Ray Tune: stands for a trial that a worker group trains.

    Passes rank 0's reports on to Tune and the study's answers back; delivers the outcome. If it
    dies and is run again, it goes through all reports from the first.
    """
    from ray import tune

    name = job["cohort"]
    report = tune_report(name, context, channel, tune.report)
    board.submit(job)
    for event in board.events(name):
        if isinstance(event, Progress):
            stops = report(event.epoch, {0: event.metrics})
            board.answer(name, event.epoch, stop=bool(stops))
        else:
            # A full disk is for the driver to raise: the trial has no end yet.
            channel.deliver(name, event if isinstance(event, NoRoomError) else [event])
    tune.report({"epoch": 0, "places": [], "values": []})


@contextlib.contextmanager
def worker_groups(context: Context, workers: Workers, board: BoardHandle) -> Iterator[None]:
    """Within the block, trials on the board find groups; a first trial is sure to come. On exit all
    groups are gone, unless the block was interrupted and a group is in a long epoch: that one goes
    with the connection."""
    threads = [
        threading.Thread(
            target=_keep_up,
            # The first group starts while Tune prepares the first trial.
            args=(f"group-{number}", context, workers, board, number == 0),
            name=f"worker-group-{number}",
            daemon=True,
        )
        for number in range(workers.count)
    ]
    for thread in threads:
        thread.start()
    patience = INTERRUPTED_SECONDS
    try:
        yield
        if not board.in_work():
            patience = END_SECONDS
    finally:
        board.close()
        give_up = time.monotonic() + patience
        for thread in threads:
            thread.join(timeout=max(0.0, give_up - time.monotonic()))


def _keep_up(
    group: str, context: Context, workers: Workers, board: BoardHandle, at_once: bool
) -> None:
    """One group from its first trial to the end of the study, started anew when it dies.
    `at_once`: without waiting for a trial."""
    try:
        while at_once or board.reserve(group):
            at_once = False
            try:
                _run_group(group, context, workers, board)
            # A trial hears why its workers died, whatever that was; the board counts.
            except Exception as error:
                board.failed(group, _reason(error))
    except Exception:
        if ray.is_initialized():
            raise
        # The connection is gone, and the group with it: the driver was interrupted.


def _run_group(group: str, context: Context, workers: Workers, board: BoardHandle) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    TorchTrainer(
        work,
        train_loop_config={"group": group, "context": context, "board": board},
        scaling_config=ScalingConfig(
            num_workers=workers.per_trial,
            use_gpu=bool(workers.gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{group}-{time.time_ns()}", storage_path=str(context.folder / "train")
        ),
    ).fit()


def work(setup: dict[str, Any]) -> None:
    """The loop of each rank: trial after trial, all ranks the same one, until there are no more."""
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device

    from core.finetuning.ranks import joined_ranks

    context: Context = setup["context"]
    board: BoardHandle = setup["board"]
    rank = train.get_context().get_world_rank()
    ranks = joined_ranks()
    prepare_worker(context)
    device = get_device()
    while True:
        name = broadcast_from_rank_zero(board.take(setup["group"]) if rank == 0 else None)
        if name is None:
            return
        try:
            outcome = train_job(board.job(name), context, board, ranks, device)
        except NoRoomError as error:
            board.no_room(name, error)
            raise  # The other ranks wait for this one in vain: the group has to end.
        patience = LONE_END_SECONDS if outcome.status in COULD_NOT_GO_ON else float("inf")
        if not board.end(name, rank, outcome, patience=patience):
            raise RuntimeError(f"rank {rank} could not go on, and others did: {outcome.reason}")


def train_job(
    job: Mapping[str, Any],
    context: Context,
    board: BoardHandle,
    ranks: Ranks,
    device: torch.device,
) -> Outcome:
    """Train the one trial of a job on this rank. A trial that cannot run is a result. Raises
    NoRoomError for a full disk."""
    from core.finetuning.out_of_memory import first_line, is_out_of_memory

    name = job["cohort"]
    (values,), (number,) = job["trials"], job["numbers"]

    def report(epoch: int, metrics: Metrics) -> bool:
        return board.report(name, epoch, metrics, wait=epoch in context.rungs)

    try:
        return finetune_trial(
            context,
            TrialConfig.from_dict(values),
            number,
            open_matrix(job["features"][0][PLAIN.name]),
            report=report,
            device=device,
            ranks=ranks,
            last_epoch=job.get("last_epoch"),
        )
    except NoRoomError:
        raise
    except InputError as error:
        return Outcome(status=Status.FAILED, reason=str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"out of memory with batches of {values['batch_size']}: {first_line(error)}"
        return Outcome(status=Status.INFEASIBLE, reason=reason)


def _reason(error: Exception) -> str:
    """Of the workers that died, the first one's last words."""
    failures = getattr(error, "worker_failures", None) or {}
    rank, cause = min(failures.items(), default=(None, error))
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    words = lines[-1] if lines else type(cause).__name__
    return (words if rank is None else f"worker {rank}: {words}")[:REASON_LENGTH]
