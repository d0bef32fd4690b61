"""The way back from the driver to running cohorts, and for what is too big for Tune's results.

Tune carries a worker's report to the driver and lets the worker go on once the driver has read it;
it has no way to answer. This small actor holds the answer (which trials stop) until the worker
asks, and a cohort's outcomes until the driver fetches them. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray

Answer = tuple[int, ...]


class Channel:
    """Mailboxes by cohort. Runs as a Ray actor of no CPU share (`start_channel`)."""

    def __init__(self) -> None:
        self._rulings: dict[tuple[str, int], Answer] = {}
        self._deliveries: dict[str, list[Any]] = {}

    def rule(self, cohort: str, epoch: int, places: Answer) -> None:
        """The driver: these trials of the cohort stop after this epoch."""
        self._rulings[cohort, epoch] = places

    def ruling(self, cohort: str, epoch: int) -> Answer:
        """The worker: which trials stop; none if the driver had nothing to say."""
        return self._rulings.pop((cohort, epoch), ())

    def deliver(self, cohort: str, item: Any) -> None:
        """The worker: something for the driver."""
        self._deliveries.setdefault(cohort, []).append(item)

    def collect(self, cohort: str) -> list[Any]:
        """The driver: all that the cohort delivered since, oldest first."""
        return self._deliveries.pop(cohort, [])


class ChannelHandle:
    """The channel as driver and workers call it. Can be pickled."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def rule(self, cohort: str, epoch: int, places: Iterable[int]) -> None:
        ray.get(self._actor.rule.remote(cohort, epoch, tuple(places)))

    def ruling(self, cohort: str, epoch: int) -> Answer:
        answer: Answer = ray.get(self._actor.ruling.remote(cohort, epoch))
        return answer

    def deliver(self, cohort: str, item: Any) -> None:
        ray.get(self._actor.deliver.remote(cohort, item))

    def collect(self, cohort: str) -> list[Any]:
        items: list[Any] = ray.get(self._actor.collect.remote(cohort))
        return items


def beside_driver() -> dict[str, Any]:
    """Options of an actor that the whole study needs: it takes no cores, and lives on the driver's
    own machine, so that the loss of another one leaves it alone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def start_channel() -> ChannelHandle:
    """A new channel; it ends with the driver."""
    return ChannelHandle(ray.remote(**beside_driver())(Channel).remote())
