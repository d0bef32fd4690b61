"""A sampler that is shown a part of a long study proposes as well as one that is shown all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.sampling import bounded
from tuner.sampling.bounded import NUM_BEST, BoundedSampler, selection
from tuner.sampling.reproducible import ReproducibleSampler

ROUND = 16


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(
        multivariate=True, group=True, constant_liar=True, n_startup_trials=10, seed=seed
    )


def _value(trial: optuna.Trial) -> float:
    """Best (0) at x = y = 1, kind `a`, rate 1e-2."""
    value = (trial.suggest_float("x", -5, 5) - 1) ** 2 + (trial.suggest_float("y", -5, 5) - 1) ** 2
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    if kind == "c":
        return -value - 3 - trial.suggest_int("steps", 1, 9, step=2)
    return -value - (kind == "b") - abs(trial.suggest_float("rate", 1e-5, 1, log=True) - 1e-2)


def _search(sampler: BaseSampler, num_trials: int) -> optuna.Study:
    """In rounds, as the searcher asks."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    while len(study.trials) < num_trials:
        asked = [study.ask() for _ in range(ROUND)]
        values = [_value(trial) for trial in asked]
        for trial, value in zip(asked, values, strict=True):
            study.tell(trial, value)
    return study


def test_it_finds_what_tpe_finds_and_chance_does_not() -> None:
    def regret(sampler: BaseSampler) -> float:
        return -_search(sampler, 160).best_value

    bounded_tpe = statistics.median(
        regret(BoundedSampler(_tpe, seed=seed, num_shown=100)) for seed in (1, 2, 3)
    )
    chance = statistics.median(regret(RandomSampler(seed=seed)) for seed in (1, 2, 3))
    assert bounded_tpe < 0.15 < chance


def test_the_same_seed_proposes_the_same_trials() -> None:
    first, second, other = (
        [t.params for t in _search(BoundedSampler(_tpe, seed=seed), 48).trials]
        for seed in (5, 5, 6)
    )
    assert first == second != other


def test_it_is_shown_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = bounded.selection

    def spying(*arguments: object) -> list[FrozenTrial]:
        shown = original(*arguments)  # type: ignore[arg-type]
        sizes.append(len(shown))
        return shown

    monkeypatch.setattr(bounded, "selection", spying)
    _search(BoundedSampler(_tpe, seed=0, num_shown=40), 96)
    # Once a round, not once a trial.
    assert sizes == [0, 16, 32, 40, 40, 40]


def _search_one_after_the_other(sampler: BaseSampler) -> list[dict[str, Any]]:
    """As the searcher does: each trial is sampled whole before the next is asked for. Some have
    settings given, some fail, and one of each round is still running in the next."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    late: list[tuple[optuna.Trial, float]] = []
    for number in range(6):
        study.enqueue_trial({"x": 0.5 * number, "kind": "c"})
        asked = []
        for _ in range(8):
            trial = study.ask()
            asked.append((trial, _value(trial)))
        asked += late
        late = [asked.pop(3)]
        for place, (trial, value) in enumerate(asked):
            if place == 5:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, value)
    return [trial.params for trial in study.trials]


def test_samplers_of_single_trials_share_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """And propose what they would if each had it put together for itself."""
    apart = _search_one_after_the_other(
        ReproducibleSampler(lambda seed: BoundedSampler(_tpe, seed=seed, num_shown=30), seed=3)
    )
    rounds = []
    original = bounded.selection

    def spying(ended: list[FrozenTrial], study: optuna.Study, bound: int) -> list[FrozenTrial]:
        rounds.append(len(ended))
        return original(ended, study, bound)

    monkeypatch.setattr(bounded, "selection", spying)
    first = BoundedSampler(_tpe, seed=0, num_shown=30)
    together = _search_one_after_the_other(ReproducibleSampler(first.seeded, seed=3))
    assert together == apart
    assert len(rounds) == 6, rounds


def test_trials_of_a_round_keep_apart() -> None:
    """Those that run are shown, too: else each of a round would be drawn from the same place."""
    study = _search(BoundedSampler(_tpe, seed=0), 64)
    asked = [study.ask() for _ in range(ROUND)]
    for trial in asked:
        _value(trial)
    assert len({trial.params["x"] for trial in asked}) == ROUND


def test_a_trial_of_an_earlier_session_is_completed() -> None:
    study = _search(RandomSampler(seed=0), 32)
    left = study.ask()
    left.suggest_float("x", -5, 5)
    study.sampler = BoundedSampler(_tpe, seed=0)
    again = optuna.Trial(study, left._trial_id)
    assert again.suggest_float("x", -5, 5) == left.params["x"]
    assert -5 <= again.suggest_float("y", -5, 5) <= 5
    study.tell(again, _value(again))


def _ended(number: int, value: float, *, pruned_at: int | None = None) -> FrozenTrial:
    trial = create_trial(
        state=TrialState.COMPLETE if pruned_at is None else TrialState.PRUNED,
        value=value if pruned_at is None else None,
        params={"x": 0.5},
        distributions={"x": FloatDistribution(0, 1)},
        intermediate_values={} if pruned_at is None else {pruned_at: value},
    )
    trial.number = number
    return trial


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_best_are_always_shown_and_the_rest_evenly(direction: str) -> None:
    study = optuna.create_study(direction=direction)  # type: ignore[arg-type]
    sign = 1 if direction == "maximize" else -1
    # The best lie far back; complete ones go before pruned ones, whatever their values.
    ended = [_ended(n, sign * (100 - n if n < 20 else 0)) for n in range(600)]
    ended += [_ended(n, sign * 1000, pruned_at=3) for n in range(600, 1000)]
    shown = [trial.number for trial in selection(ended, study, 250)]
    assert len(set(shown)) == len(shown) == 250 and shown == sorted(shown)
    assert set(range(20)) <= set(shown)
    assert shown[-1] == 999  # the newest
    gaps = [b - a for a, b in zip(shown[NUM_BEST:], shown[NUM_BEST + 1 :], strict=False)]
    assert max(gaps) <= 6
    assert selection(ended[:250], study, 250) == ended[:250]


def test_pruned_trials_rank_by_how_far_they_came() -> None:
    study = optuna.create_study(direction="maximize")
    far = [_ended(n, 0.1, pruned_at=9) for n in range(300, 330)]
    near = [_ended(n, 0.9, pruned_at=3) for n in range(300)]
    shown = {trial.number for trial in selection([*near, *far], study, 100)}
    assert len(shown & set(range(300, 330))) >= NUM_BEST


def test_what_violates_a_constraint_is_not_among_the_best() -> None:
    study = optuna.create_study(direction="maximize")
    ended = [_ended(n, 0.5) for n in range(300)]
    for trial in ended[:40]:
        trial.set_constraint("size_mb", 1.0)
        trial.value = 0.9
    for trial in ended[40:60]:
        trial.set_constraint("size_mb", -1.0)
        trial.value = 0.6
    shown = {trial.number for trial in selection(ended, study, 100)}
    assert set(range(40, 60)) <= shown
    assert len(shown & set(range(40))) < 20


def test_of_several_objectives_the_front_is_shown() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    rng = np.random.default_rng(0)
    ended = []
    for number in range(400):
        score, cost = rng.random(2)
        trial = create_trial(
            values=[score, cost],
            params={"x": score},
            distributions={"x": FloatDistribution(0, 1)},
        )
        trial.number = number
        ended.append(trial)
    front = {
        own.number
        for own in ended
        if not any(
            o.values[0] >= own.values[0] and o.values[1] <= own.values[1] and o is not own
            for o in ended
        )
    }
    assert 3 < len(front) <= NUM_BEST
    assert front <= {trial.number for trial in selection(ended, study, 100)}


def test_tpe_searches_for_a_front_when_bounded() -> None:
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=BoundedSampler(_tpe, seed=0, num_shown=60)
    )
    for _ in range(80):
        trial = study.ask()
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        study.tell(trial, [x - y, x])
    late = [trial.params["y"] for trial in study.trials[40:]]
    assert statistics.median(late) < 0.25  # y costs score and gains nothing
