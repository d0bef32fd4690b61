"""Writes that wait: order, retries without limit, refusals, and who waits how long."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import tuner.tracking.delivery
from tuner.tracking.delivery import NICENESS, Away, Delivery

LONG = 60.0
"""Seconds that nothing here takes, even on a busy machine."""


class Server:
    """What is written; away for as long as a test says."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.there.set()
        self.tries = 0
        self.written: list[int] = []
        self.changes: list[Away | None] = []

    def write(self, value: int) -> Callable[[], None]:
        def job() -> None:
            self.tries += 1
            if not self.there.is_set():
                raise ConnectionError("away")
            if value < 0:
                raise ValueError(f"{value} is refused")
            self.written.append(value)

        return job


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def delivery(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Delivery]:
    monkeypatch.setattr(tuner.tracking.delivery, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(tuner.tracking.delivery, "LONGEST_PAUSE", 0.05)
    delivery = Delivery(lambda error: isinstance(error, OSError), server.changes.append)
    yield delivery
    delivery.give_up()
    delivery.close(0)


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_nothing_is_lost_or_done_twice_while_the_server_is_away(
    server: Server, delivery: Delivery
) -> None:
    delivery.put(server.write(0))
    assert delivery.wait(LONG)
    server.there.clear()
    before = time.time()
    for value in range(1, 6):
        delivery.put(server.write(value))
    _until(lambda: server.tries > 4)
    away = delivery.away
    assert away is not None and away.waiting == 5 and str(away.error) == "away"
    assert before <= away.since <= time.time()
    assert server.written == [0]
    server.there.set()
    assert delivery.wait(LONG)
    assert server.written == [0, 1, 2, 3, 4, 5]
    assert delivery.away is None and delivery.troubled
    # Told once that it went, and once that it is back.
    assert [change is None for change in server.changes] == [False, True]


def test_waiting_ends_when_nobody_answers(server: Server, delivery: Delivery) -> None:
    server.there.clear()
    delivery.put(server.write(1))
    started = time.monotonic()
    assert not delivery.wait(0.3)
    assert 0.3 < time.monotonic() - started < LONG
    with pytest.raises(TimeoutError):
        delivery.ask(lambda: server.write(2)(), limit=0.3)
    delivery.give_up()
    delivery.put(server.write(3))
    server.there.set()
    assert delivery.waiting == 0
    delivery.close(0.3)
    assert server.written == []


def test_a_long_write_is_waited_for_unless_strictly(server: Server, delivery: Delivery) -> None:
    release = threading.Event()
    delivery.put(lambda: release.wait(LONG))
    assert not delivery.wait(0.2, strict=True)
    started = time.monotonic()
    threading.Timer(0.8, release.set).start()
    assert delivery.wait(0.2)
    assert release.is_set() and time.monotonic() - started >= 0.8


def test_answers_count_as_progress(server: Server, delivery: Delivery) -> None:
    """Twenty writes of 0.1 s take longer than the limit, but something happens all the time."""
    started = time.monotonic()
    for value in range(20):
        delivery.put(lambda value=value: (time.sleep(0.1), server.write(value)()))
    assert delivery.wait(1.5, strict=True)
    assert len(server.written) == 20 and time.monotonic() - started > 1.5


def test_what_is_refused_does_not_hold_up_the_rest(server: Server, delivery: Delivery) -> None:
    for value in (1, -2, 3):
        delivery.put(server.write(value))
    assert delivery.wait(LONG)
    assert server.written == [1, 3]
    assert [str(error) for error in delivery.refused] == ["-2 is refused"]
    assert server.tries == 3 and not delivery.troubled


def test_nothing_follows_an_essential_write_that_is_refused(
    server: Server, delivery: Delivery
) -> None:
    go = threading.Event()
    delivery.put(lambda: go.wait(LONG))
    delivery.put(server.write(-1), essential=True)
    delivery.put(server.write(2))
    go.set()
    assert not delivery.wait(LONG)
    assert server.written == [] and len(delivery.refused) == 1


def test_a_question_is_asked_in_its_turn(server: Server, delivery: Delivery) -> None:
    delivery.put(server.write(1))
    assert delivery.ask(lambda: list(server.written), limit=LONG) == [1]
    with pytest.raises(ValueError, match="-4 is refused"):
        delivery.ask(server.write(-4), limit=LONG)
    assert delivery.refused == []  # Whoever asked was told.
    server.there.clear()
    tries = server.tries
    threading.Timer(0.3, server.there.set).start()

    def ask() -> int:
        server.write(5)()
        return 7

    assert delivery.ask(ask, limit=LONG) == 7
    assert server.written == [1, 5] and server.tries > tries + 1


def test_the_start_is_waited_for_until_it_is_clear_how_it_goes(
    server: Server, delivery: Delivery
) -> None:
    delivery.put(server.write(1))
    assert delivery.settled()
    assert server.written == [1]
    server.there.clear()
    delivery.put(server.write(2))
    assert not delivery.settled()


def test_closing_waits_and_ends_the_thread(server: Server, delivery: Delivery) -> None:
    for value in range(20):
        delivery.put(server.write(value))
    delivery.close(LONG)
    assert server.written == list(range(20))
    _until(lambda: not any(thread.name == "delivery" for thread in threading.enumerate()))
    delivery.put(server.write(20))
    assert delivery.wait(LONG) and server.written[-1] == 20


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_who_writes_lets_others_go_first(delivery: Delivery) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert delivery.ask(niceness, limit=LONG) >= max(before, NICENESS)
    assert niceness() == before
