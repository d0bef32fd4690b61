"""A machine of a cluster is lost in mid-study: its trials go on elsewhere, each once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from ..processes import family, left_of, output_of, wait_for, without_agents
from .small_study import NUM_TRIALS, PROBES
from .workplace import Workplace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NODE: dict[str, Any] = {
    "num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}  # fmt: skip
"""A dead machine is found out in seconds, in place of half a minute."""


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of two nodes; the first is its head."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": QUICK})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_trials_of_a_lost_node_go_on_elsewhere(pair: Cluster, tmp_path: Path) -> None:
    place = Workplace(tmp_path, PROBES)
    second = pair.add_node(**NODE)
    (raylet,) = second.all_processes["raylet"]

    def cohort_is_there() -> bool:
        """A worker of the second node has been used for trials; most likely it is in one."""
        workers = family(raylet.process.pid).values()
        return place.num_ended("lost") >= 6 and any(b"ImplicitFunc" in text for text in workers)

    with place.start(*place.search("lost", "--address", pair.address)) as process:
        wait_for(cohort_is_there, process)
        lost = without_agents(family(raylet.process.pid))
        pair.remove_node(second, allow_graceful=False)
        before = place.num_ended("lost")
        output = output_of(process)
    assert before < NUM_TRIALS, "the study was over before its node was lost"
    place.check_whole("lost", NUM_TRIALS)
    assert "models:/drawn@challenger" in output
    assert left_of(lost) == {}, "a worker of the lost node lives on"
