"""How many trials are asked for at once.

Trials of a round do not learn from each other: with rounds of 32 throughout, TPE needs more trials
for the same result. But a step of few heads is mostly calls, and a trial of a small round costs
more. So a round is small while little is known, but not smaller than what fills a stack somewhat
(`tests/benchmarks/README.md`, rounds). The size follows from the number of trials alone, so that a
resumed study goes on with the rounds that it would have had.
"""

from __future__ import annotations

from ..spaces.space import SearchSpace
from .options import check_name, check_options
from .samplers import SAMPLERS

SMALLEST_ROUND = 8
ROUND_SHARE = 4
"""A round is one part in so many of the trials before it."""


def round_size(space: SearchSpace, num_asked: int) -> int:
    """The size of the round that begins after `num_asked` trials of the study.

    `cohort_size` is the most. Fine-tuning trials share nothing, so that each is asked for when a
    worker is free.
    """
    kind = SAMPLERS[check_name("sampler", space.sampler.name, SAMPLERS)]
    if not kind.learns:
        return space.cohort_size
    startup = getattr(check_options("sampler", space.sampler, kind.options), "startup_trials", 0)
    if num_asked < startup:
        return int(min(space.cohort_size, startup - num_asked))
    if space.mode == "finetune":
        return 1
    return min(space.cohort_size, max(SMALLEST_ROUND, num_asked // ROUND_SHARE))


def rest_of_round(space: SearchSpace, num_asked: int) -> int:
    """How many trials the last round lacks, if a kill came while it was asked for."""
    end = 0
    while end < num_asked:
        end += round_size(space, end)
    return end - num_asked


def num_rounds(space: SearchSpace, begin: int, end: int) -> int:
    """How many rounds there are from trial `begin` up to before trial `end`."""
    rounds = 0
    while begin < end:
        begin += round_size(space, begin)
        rounds += 1
    return rounds
