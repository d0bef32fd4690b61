"""Processes that train a part of a cohort's heads: the same numbers, and no end unnoticed."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import TrialConfig
from core.probing import helper_pool, hosts
from core.probing.fold import Task
from core.probing.group import Group, Part, Source
from core.probing.helper_pool import Helper, MatrixFile, by_name, end_helpers, start_helpers
from core.probing.kept_inputs import KeptInputs
from core.probing.probe import train_probes
from core.report import Outcome, keep_going

N, D, C = 240, 16, 6
HOLD_OUT = [(np.arange(160, dtype=np.int64), np.arange(160, N, dtype=np.int64))]
PATIENCE = 60.0


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _all_ready() -> bool:
    return bool(helper_pool._helpers) and all(helper.ready for helper in helper_pool._helpers)


@pytest.fixture
def helper(two_threads: None) -> Iterator[Helper]:
    start_helpers(1)
    _until(_all_ready)
    yield helper_pool._helpers[0]
    end_helpers()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that helpers are sent from now on."""
    sent: list[Any] = []
    send = Helper.send

    def noting(self: Helper, message: object) -> None:
        sent.append(message)
        send(self, message)

    monkeypatch.setattr(Helper, "send", noting)
    return sent


def _data() -> tuple[np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(0)
    targets = (rng.random((N, C)) < [0.6, 0.5, 0.4, 0.3, 0.3, 0.2]).astype(np.float32)
    features = targets @ rng.normal(0, 1, (C, D)) + rng.normal(0, 1.5, (N, D))
    return features.astype(np.float32), torch.from_numpy(targets)


def _heads(count: int = 16) -> list[TrialConfig]:
    """Every optimizer and loss, linear heads and MLPs with dropout, of two lengths."""
    return [
        TrialConfig(
            backbone="ffn",
            epochs=2 + place % 2,
            batch_size=40,
            lr=0.02,
            seed=place,
            optimizer=("sgd", "adam", "adamw", "rmsprop")[place // 2 % 4],
            loss=("bce", "cross_entropy", "focal", "asymmetric")[place % 4],
            **({"head": "mlp", "hidden_sizes": (9,), "dropout": 0.3} if place % 3 == 0 else {}),
        )
        for place in range(count)
    ]


def _train(features: np.ndarray | None = None, **settings: Any) -> list[Outcome]:
    own, targets_NC = _data()
    matrix = own if features is None else features
    return train_probes(matrix, targets_NC, HOLD_OUT, _heads(), keep_state=True, **settings)


def _check_same(outcomes: list[Outcome], others: list[Outcome]) -> None:
    """To the bit, but for how long it took."""
    for one, other in zip(outcomes, others, strict=True):
        assert (one.status, one.curve, one.best_metrics) == (
            other.status,
            other.curve,
            other.best_metrics,
        )
        assert one.state is not None and other.state is not None
        for name, tensor in one.state.items():
            assert torch.equal(tensor, other.state[name])


def test_a_helper_trains_the_same_heads(
    two_threads: None, messages: list[Any], tmp_path: Path
) -> None:
    threads = _train()
    assert messages == []
    start_helpers(1)
    try:
        _until(_all_ready)
        np.save(tmp_path / "features.npy", _data()[0])
        mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
        for features in (None, mapped):
            _check_same(_train(features), threads)
    finally:
        end_helpers()
    begins = [message for message in messages if isinstance(message, helper_pool.Begin)]
    assert [type(begin.sources[0].features) for begin in begins] == [np.ndarray, MatrixFile]
    for begin in begins:
        assert 4 <= sum(len(part.configs) for part in begin.parts.values()) <= 12
    epochs = [message for message in messages if isinstance(message, helper_pool.Apply)]
    assert len(epochs) == 2 * 3 * 2  # two runs of three epochs, to train and to let leave


def test_stops_reach_the_helper(helper: Helper) -> None:
    def stop_odd(epoch: int, metrics: Any) -> list[int]:
        assert list(metrics) == sorted(metrics)
        return [place for place in metrics if place % 2] if epoch == 1 else []

    outcomes = _train(report=stop_odd)
    assert [len(outcome.curve) for outcome in outcomes] == [2, 1] * 8


def test_cohorts_do_not_wait_for_a_helper_to_start(
    two_threads: None, messages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Helper, "ready", property(lambda self: False))
    start_helpers(1)
    try:
        _train()
    finally:
        end_helpers()
    assert messages == []


def test_a_helper_that_cannot_start_is_done_without(
    two_threads: None, messages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    start_helpers(1)
    try:
        _train()  # perhaps before its end is seen
        _until(lambda: helper_pool._helpers[0]._process.poll() is not None)
        _train()
    finally:
        end_helpers()
    assert messages == []


def test_features_too_big_to_copy_stay_with_the_threads(
    helper: Helper, messages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "COPIES_BYTES", 4 * N * D - 1)
    _train()
    assert messages == []
    monkeypatch.setattr(hosts, "COPIES_BYTES", 4 * N * D)
    _train()
    assert messages


def test_a_helper_that_starts_late_takes_over_groups(
    two_threads: None, helper: Helper, messages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a cohort, and the heads go on where they were: weights, optimizers'
    states, schedules, masks, curves."""
    late = [False]
    monkeypatch.setattr(Helper, "ready", property(lambda self: late[0]))
    threads = _train()
    assert messages == []

    def begin_late(epoch: int, metrics: Any) -> tuple[int, ...]:
        late[0] = True
        return ()

    _check_same(_train(report=begin_late), threads)
    takes = [message for message in messages if isinstance(message, helper_pool.Take)]
    # Later ones may follow, as the clock has it.
    assert {len(curve) for curve in takes[0].state.curves.values()} == {1}


def test_groups_move_when_the_others_have_left(helper: Helper, messages: list[Any]) -> None:
    """All heads of one host stop: the other's are shared."""
    features, targets_NC = _data()
    # Three shapes, which do not share a stack.
    heads = [
        TrialConfig(
            backbone="ffn", epochs=4, batch_size=40, seed=size, head="mlp", hidden_sizes=(size,),
            dropout=0.2, lr=0.01,
        )
        for size in (8, 8, 9, 9, 10, 10, 11, 11)
    ]  # fmt: skip

    def own_stop(epoch: int, metrics: Any) -> list[int]:
        if epoch != 2:
            return []
        (begin,) = (message for message in messages if isinstance(message, helper_pool.Begin))
        theirs = {place for part in begin.parts.values() for place in part.configs}
        assert 0 < len(theirs) < len(heads)
        return [place for place in metrics if place not in theirs]

    def train() -> list[Outcome]:
        return train_probes(features, targets_NC, HOLD_OUT, heads, keep_state=True, report=own_stop)

    moved = train()
    gives = [message for message in messages if isinstance(message, helper_pool.Give)]
    assert gives
    stopped = [place for place, outcome in enumerate(moved) if len(outcome.curve) == 2]
    end_helpers()
    stays = train_probes(
        features, targets_NC, HOLD_OUT, heads, keep_state=True,
        report=lambda epoch, metrics: stopped if epoch == 2 else (),
    )  # fmt: skip
    for one, other in zip(moved, stays, strict=True):
        assert (one.status, one.curve) == (other.status, other.curve)


def test_parts_are_dealt_out_by_what_they_cost() -> None:
    assert hosts.dealt_out([1, 5, 2, 2], [1, 1]) == [1, 0, 1, 1]
    assert hosts.dealt_out([1, 1, 1, 1], [3, 1]).count(0) == 3
    assert hosts.dealt_out([1], [1, 1]) == [0]


def test_moves_go_from_who_has_most_to_who_has_least() -> None:
    assert hosts.moves([1, 1, 1, 1], [0, 0, 0, 0], [1, 1]) == {0: 1, 1: 1}
    assert hosts.moves([1, 1], [0, 1], [1, 1]) == {}
    assert hosts.moves([3, 0, 0], [0, 0, 1], [1, 1]) == {}  # one that cannot be cut
    assert hosts.moves([1.0, 0.95], [0, 1], [1, 1]) == {}
    assert hosts.moves([], [], [1, 1]) == {}
    assert hosts.moves([1, 1, 1, 1], [0, 0, 0, 0], [2, 1, 1]) == {0: 1, 1: 2}


def test_a_killed_helper_is_said_and_the_next_cohort_trains(helper: Helper) -> None:
    def kill(epoch: int, metrics: Any) -> tuple[int, ...]:
        if epoch == 1:
            os.kill(helper.pid, signal.SIGKILL)
        return ()

    with pytest.raises(RuntimeError, match=r"ended \(exit code -9\)"):
        _train(report=kill)
    again = _train()
    assert helper_pool._helpers[0].pid != helper.pid
    _until(_all_ready)
    _check_same(_train(), again)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, None])
def test_an_interruption_leaves_helpers_that_work(helper: Helper, sent: int | None) -> None:
    """Signals go to the helper, too, which leaves them to the process that asks."""

    def interrupt(epoch: int, metrics: Any) -> tuple[int, ...]:
        if sent is not None:
            os.kill(helper.pid, sent)
        if epoch == 2:
            raise KeyboardInterrupt
        return ()

    with pytest.raises(KeyboardInterrupt):
        _train(report=interrupt)
    _until(_all_ready)
    _check_same(_train(), _train())


@contextmanager
def _crew_of(parts: Sequence[Part]) -> Iterator[hosts.Crew]:
    features, targets_NC = _data()
    task = Task(
        targets_NC=targets_NC,
        folds=HOLD_OUT,
        objective="top3_accuracy",
        order_seed=0,
        precision="float32",
        last_epoch=None,
    )
    with hosts.side_by_side(parts, [Source(features=features)], task, "cpu", KeptInputs()) as crew:
        yield crew


def _one_each(seconds: Sequence[float]) -> list[Part]:
    """Parts of a head each, and what their epochs are guessed to take."""
    return [
        Part(configs={place: config}, seconds={place: guess})
        for place, (config, guess) in enumerate(zip(_heads(len(seconds)), seconds, strict=True))
    ]


def test_what_goes_wrong_in_a_helper_is_raised_here(helper: Helper) -> None:
    with (
        pytest.raises(AttributeError, match="no attribute 'nonsense'"),
        _crew_of(_one_each([1.0, 1.0])) as crew,
    ):
        assert len(crew.each(operator.methodcaller("train_epoch", epoch=1))) == 2
        crew.each(_only_in_helpers)
    _until(_all_ready)
    assert helper_pool._helpers[0].pid != helper.pid


def test_groups_move_by_what_their_epochs_took(helper: Helper) -> None:
    """As guessed, one head is worth three others; then the clock says that all are alike."""
    with _crew_of(_one_each([3.0, 1.0, 1.0, 1.0])) as crew:
        before = dict(crew.each(_where))
        assert [place for place in before if before[place] == before[0]] == [0]
        for _ in range(hosts.SETTLED):
            crew.balance((), dict.fromkeys(before, 0.5))
        after = dict(crew.each(_where))
    assert sorted(Counter(after.values()).values()) == [2, 2]
    assert set(after.values()) == {os.getpid(), helper.pid}


def _where(group: Group) -> tuple[int, int]:
    """A group's head, and the process that has it."""
    (place,) = group.configs
    return place, os.getpid()


def _only_in_helpers(group: Any) -> None:
    if os.getppid() == int(os.environ["TEST_HELPERS_PARENT"]):
        _ = group.nonsense


@pytest.fixture(autouse=True)
def _say_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_HELPERS_PARENT", str(os.getpid()))


def test_a_helper_ends_with_the_process_that_asks() -> None:
    """However that ends."""
    code = (
        "import os, signal, time\n"
        "from core.probing import helper_pool\n"
        "helper_pool.start_helpers(1)\n"
        "while not helper_pool._helpers[0].ready: time.sleep(0.02)\n"
        "print(helper_pool._helpers[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    _until(lambda: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_part_of_a_mapped_file_is_sent_by_value(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    whole = np.load(tmp_path / "m.npy", mmap_mode="r")
    named = by_name(whole)
    assert isinstance(named, MatrixFile)
    assert np.array_equal(named.open(), whole)
    for part in (whole[2:], whole[:, :1], whole.T, np.array(whole)):
        assert by_name(part) is part


def test_no_more_helpers_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(helper_pool, "_helpers", [])
    monkeypatch.setattr(helper_pool, "Helper", lambda: started.append(1))
    start_helpers(100)
    assert len(started) == helper_pool.MAX_HELPERS
    start_helpers(3)
    assert len(started) == helper_pool.MAX_HELPERS


def test_nobody_hears_of_nothing(helper: Helper) -> None:
    """Fewer stacks than threads need no helper."""
    features, targets_NC = _data()
    (one,) = train_probes(features, targets_NC, HOLD_OUT, _heads(1), report=keep_going)
    assert len(one.curve) == 2
