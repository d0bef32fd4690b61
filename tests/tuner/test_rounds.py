"""How many trials are asked for at once: against rounds counted by hand, and after a kill."""

from __future__ import annotations

from typing import Any

import pytest

from tuner.sampling.rounds import num_rounds, rest_of_round, round_size
from tuner.sampling.samplers import SAMPLERS
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace


def make_space(sampler: Any, cohort_size: int = 32, **others: Any) -> SearchSpace:
    parameters = {"backbone": ["ffn", "resnet18"], "lr": [0.1, 0.01]}
    values = {"sampler": sampler, "cohort_size": cohort_size, "parameters": parameters, **others}
    return parse_space(values, name="test")


def rounds_of(space: SearchSpace, trials: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < trials:
        sizes.append(round_size(space, sum(sizes)))
    return sizes


def test_random_trials_at_once_then_few_then_a_part_of_what_is_known() -> None:
    sizes = rounds_of(make_space("tpe"), 400)
    assert sizes[:8] == [14, 8, 8, 8, 9, 11, 14, 18]  # 38 trials before the fifth
    assert sizes == sorted(sizes[:1]) + sorted(sizes[1:])
    assert sizes[-1] == 32
    assert len(sizes) < 25


def test_cohort_size_is_the_most() -> None:
    sizes = rounds_of(make_space({"name": "tpe", "startup_trials": 8}, cohort_size=6), 60)
    assert sizes[:2] == [6, 2] and max(sizes) == 6
    assert set(rounds_of(make_space("tpe", cohort_size=3), 60)) == {3, 2}  # 14 are not 3 x 5


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_who_does_not_learn_may_be_asked_for_all(name: str) -> None:
    """Asking is the same in rounds of any size exactly for those that say so."""
    space = make_space(name, cohort_size=16)
    assert (set(rounds_of(space, 160)) == {16}) == (not SAMPLERS[name].learns)


def test_fine_tuning_trials_are_asked_for_one_by_one() -> None:
    sampler = {"name": "tpe", "startup_trials": 6}
    assert rounds_of(make_space(sampler, 4, mode="finetune"), 10) == [4, 2, 1, 1, 1, 1]


def test_a_cut_off_round_is_completed() -> None:
    space = make_space("tpe")
    assert [rest_of_round(space, asked) for asked in (0, 1, 13, 14, 15, 22, 43)] == [
        0, 13, 1, 0, 7, 0, 4,
    ]  # fmt: skip


def test_rounds_are_counted() -> None:
    space = make_space("tpe")
    sizes = rounds_of(space, 200)
    assert num_rounds(space, 0, sum(sizes)) == len(sizes)
    assert num_rounds(space, 0, sum(sizes) - 1) == len(sizes), "the last one is cut short"
    assert num_rounds(space, sum(sizes[:3]), sum(sizes)) == len(sizes) - 3
    assert num_rounds(space, 7, 7) == 0
