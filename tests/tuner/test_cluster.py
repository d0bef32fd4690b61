"""How a cluster is shared out among fine-tuning trials, and what cannot be."""

from __future__ import annotations

import math

import pytest

from core.errors import InputError
from tuner.trials.cluster import ONE_WORKER, Machine, Share, Workers, check_share


def _workers(*machines: tuple[float, float]) -> Workers:
    found = tuple(Machine(cpus=cpus, gpus=gpus) for cpus, gpus in machines)
    gpus = 1.0 if any(m.gpus for m in found) else 0.0
    return Workers(count=1, cpus=found[0].cpus, gpus=gpus, machines=found)


@pytest.mark.parametrize(
    "machines, share, expected",
    [
        # (trials at once, cores and GPUs of each worker)
        ([(8, 0)], ONE_WORKER, (1, 8, 0)),
        ([(2, 0)], Share(workers=2), (1, 1, 0)),
        ([(8, 0)], Share(workers=2), (1, 4, 0)),
        ([(7, 0)], Share(workers=3), (1, 2, 0)),
        ([(8, 0), (8, 0)], ONE_WORKER, (2, 8, 0)),
        ([(8, 0), (8, 0)], Share(workers=2), (2, 4, 0)),
        ([(8, 0), (4, 0)], Share(workers=2), (3, 2, 0)),
        ([(2, 0), (2, 0)], Share(workers=4), (1, 1, 0)),
        ([(16, 4)], ONE_WORKER, (4, 4, 1)),
        ([(16, 4)], Share(workers=2), (2, 4, 1)),
        ([(16, 4)], Share(gpus=0.5), (8, 2, 0.5)),
        ([(16, 4)], Share(gpus=0.3), (12, 1, 0.3)),
        ([(16, 4)], Share(gpus=2), (2, 8, 2)),
        ([(16, 4), (16, 2)], Share(workers=3), (2, 4, 1)),
        ([(4, 0), (16, 2)], Share(workers=2), (1, 8, 1)),
        # More GPUs than cores: what runs at once must have a core each.
        ([(2, 4)], ONE_WORKER, (2, 1, 1)),
        # GPUs that are there and not wanted.
        ([(16, 4)], Share(gpus=0), (1, 16, 0)),
    ],
)
def test_what_a_trial_takes_says_how_many_run_at_once(
    machines: list[tuple[float, float]], share: Share, expected: tuple[int, float, float]
) -> None:
    workers = _workers(*machines).for_trials(share)
    assert (workers.count, workers.cpus, workers.gpus) == expected
    assert workers.per_trial == share.workers
    # Whatever is started fits at once, or worker groups would wait for each other.
    total = workers.count * workers.per_trial
    assert total * workers.cpus <= sum(cpus for cpus, _ in machines)
    assert total * workers.gpus <= sum(gpus for _, gpus in machines)


def test_threads_and_memory_follow_the_share_of_cores() -> None:
    workers = _workers((8, 0)).for_trials(Share(workers=2))
    assert (workers.num_threads, workers.memory_share) == (4, 0.5)
    assert _workers((16, 4)).for_trials(Share(gpus=0.25)).memory_share == 0.25
    assert _workers((16, 4)).for_trials(Share(gpus=2)).memory_share == 1


@pytest.mark.parametrize(
    "machines, share, words",
    [
        ([(2, 0)], Share(workers=3), "3 times a core, and the cluster has 2 cores and 0 GPUs"),
        ([(2, 0)], Share(gpus=1), "1 times 1 GPUs"),
        ([(16, 4)], Share(workers=5), "5 times 1 GPUs, and the cluster has 16 cores and 4 GPUs"),
        ([(16, 4)], Share(gpus=5), "1 times 5 GPUs"),
        ([(1, 2)], Share(workers=2), "2 times 1 GPUs"),
    ],
)
def test_more_than_the_cluster_has(
    machines: list[tuple[float, float]], share: Share, words: str
) -> None:
    with pytest.raises(InputError, match="no trial would fit") as caught:
        _workers(*machines).for_trials(share)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "share, finetunes, words",
    [
        (Share(workers=0), True, "a trial needs a worker"),
        (Share(workers=-1), False, "a trial needs a worker"),
        (Share(workers=2), False, "probes share one pass"),
        (Share(gpus=-1), True, "0 GPUs or more"),
        (Share(gpus=math.nan), True, "0 GPUs or more"),
        (Share(gpus=math.inf), True, "0 GPUs or more"),
        (Share(gpus=1.5), True, "a fraction is less than 1"),
        (Share(workers=2, gpus=0.5), True, "for trials of one worker"),
    ],
)
def test_shares_that_make_no_sense(share: Share, finetunes: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_share(share, finetunes=finetunes)


@pytest.mark.parametrize(
    "share, finetunes",
    [
        (ONE_WORKER, False),
        (Share(gpus=0.5), True),
        (Share(workers=2, gpus=1), True),
        (Share(workers=4, gpus=0), True),
    ],
)
def test_shares_that_do(share: Share, finetunes: bool) -> None:
    check_share(share, finetunes=finetunes)
