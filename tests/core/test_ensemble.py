"""Greedy ensembles against plain loops over numpy. S seeds, M members, N pictures, C classes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from core.models.ensemble import mean_logits, select_members, select_over_seeds
from core.objectives import METRICS

N, C = 40, 6
TOP3 = METRICS["top3_accuracy"]
PRECISION = METRICS["mean_average_precision"]


def data(num_members: int, seed: int = 0, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Members that know the targets behind noise of their own."""
    rng = np.random.default_rng(seed)
    targets_NC = (rng.random((N, C)) < 0.3).astype(np.float32)
    targets_NC[np.arange(N), rng.integers(0, C, N)] = 1
    logits = 2 * targets_NC - 1 + noise * rng.normal(size=(num_members, N, C))
    return 1 / (1 + np.exp(-logits)), targets_NC


def plain_top3(probs_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    best_N3 = np.argsort(-probs_NC, axis=1, kind="stable")[:, :3]
    return float(np.take_along_axis(targets_NC, best_N3, 1).sum()) / float(targets_NC.sum())


def plain_precision(probs_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    return float(average_precision_score(targets_NC, probs_NC, average="macro"))


def plain_greedy(
    probs_MNC: np.ndarray, targets_NC: np.ndarray, score, num_picks: int
) -> tuple[list[int], float]:
    """The paper's loop in words: try each addition, keep the best, remember the best prefix."""
    picks: list[int] = []
    values: list[float] = []
    for _ in range(num_picks):
        tried = [score(probs_MNC[[*picks, m]].mean(0), targets_NC) for m in range(len(probs_MNC))]
        picks.append(int(np.argmax(tried)))
        values.append(max(tried))
    length = int(np.argmax(values)) + 1
    return picks[:length], values[length - 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("objective", "score"), [(TOP3, plain_top3), (PRECISION, plain_precision)], ids=["top3", "map"]
)
def test_picks_are_those_of_a_plain_loop(objective, score, seed: int) -> None:
    probs_MNC, targets_NC = data(5, seed)
    expected, value = plain_greedy(probs_MNC, targets_NC, score, 8)
    selection = select_members(
        torch.from_numpy(probs_MNC), torch.from_numpy(targets_NC), objective=objective, num_picks=8
    )
    assert list(selection.picks) == expected
    assert selection.value == pytest.approx(value, abs=1e-9)
    shares = [expected.count(m) / len(expected) for m in range(5)]
    assert selection.weights == pytest.approx(shares)
    assert len(set(expected)) > 1, "a case without an ensemble would show little"


@pytest.mark.parametrize("seed", range(5))
def test_two_picks_are_the_best_pair_with_the_best_member(seed: int) -> None:
    """Every pair that holds the best single member, tried one by one."""
    probs_MNC, targets_NC = data(4, seed)
    singles = [plain_top3(probs, targets_NC) for probs in probs_MNC]
    best = int(np.argmax(singles))
    pairs = [plain_top3(probs_MNC[[best, other]].mean(0), targets_NC) for other in range(4)]
    selection = select_members(
        torch.from_numpy(probs_MNC), torch.from_numpy(targets_NC), objective=TOP3, num_picks=2
    )
    assert selection.value == pytest.approx(max(singles[best], *pairs))


def test_a_member_may_weigh_more_than_another() -> None:
    found = set()
    for seed in range(6):
        probs_MNC, targets_NC = data(3, seed)
        selection = select_members(
            torch.from_numpy(probs_MNC), torch.from_numpy(targets_NC), objective=TOP3, num_picks=9
        )
        found |= set(selection.weights)
        assert sum(selection.weights) == pytest.approx(1)
        assert set(selection.picks) == {m for m, w in enumerate(selection.weights) if w}
    assert found - {0.0, 1.0, 0.5, 1 / 3}, "some weights come from repeated picks"


def test_the_smallest_of_equal_ensembles_is_taken() -> None:
    probs_MNC, targets_NC = data(1)
    selection = select_members(
        torch.from_numpy(probs_MNC), torch.from_numpy(targets_NC), objective=TOP3, num_picks=5
    )
    assert (selection.picks, selection.weights) == ((0,), (1.0,))
    twice = torch.from_numpy(np.concatenate([probs_MNC, probs_MNC]))
    selection = select_members(twice, torch.from_numpy(targets_NC), objective=TOP3, num_picks=5)
    assert selection.weights == (1.0, 0.0), "of equal members the first"


@pytest.mark.parametrize(
    ("probs", "picks", "message"),
    [
        (torch.rand(2, N, C), 0, "num_picks >= 1"),
        (torch.rand(0, N, C), 3, "a member must hold"),
        (torch.rand(2, N, C) + 1, 3, r"in 0\.\.1"),
        (torch.full((2, N, C), float("nan")), 3, r"in 0\.\.1"),
    ],
)
def test_what_cannot_be_selected_from_is_refused(probs: Tensor, picks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_members(probs, torch.ones(N, C), objective=TOP3, num_picks=picks)


@pytest.mark.parametrize("seed", range(3))
def test_the_estimate_is_of_seeds_that_did_not_pick(seed: int) -> None:
    """By hand: pick with each seed, score the same weights with every other one."""
    num_seeds, num_members = 3, 4
    probs, targets_NC = data(num_seeds * num_members, seed)
    probs_SMNC = probs.reshape(num_seeds, num_members, N, C)
    estimates, own = [], []
    for s in range(num_seeds):
        picks, value = plain_greedy(probs_SMNC[s], targets_NC, plain_top3, 6)
        own.append(value)
        others = [probs_SMNC[t][picks].mean(0) for t in range(num_seeds) if t != s]
        estimates.append(np.mean([plain_top3(mean_NC, targets_NC) for mean_NC in others]))
    chosen = select_over_seeds(
        torch.from_numpy(probs_SMNC), torch.from_numpy(targets_NC), objective=TOP3, num_picks=6
    )
    assert chosen.estimate == pytest.approx(np.mean(estimates))
    assert chosen.seed == int(np.argmax(estimates))
    assert chosen.selection.value == pytest.approx(own[chosen.seed])
    assert chosen.estimate < np.mean(own), "what picked flatters itself"


def test_one_seed_cannot_judge_itself() -> None:
    with pytest.raises(ValueError, match="two seeds are needed"):
        select_over_seeds(torch.rand(1, 2, N, C), torch.ones(N, C), objective=TOP3, num_picks=2)


def test_the_mean_is_of_calibrated_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(N, C)) for _ in range(3)]
    calibrations = [(1.0, 0.0), (0.3, -1.0), (2.0, 0.5)]
    weights = [0.5, 0.2, 0.3]
    mean = sum(
        w / (1 + np.exp(-(scale * x + bias)))
        for x, (scale, bias), w in zip(logits, calibrations, weights, strict=True)
    )
    found = mean_logits(
        [torch.from_numpy(x) for x in logits], calibrations=calibrations, weights=weights
    )
    np.testing.assert_allclose(torch.sigmoid(found), mean, atol=1e-6)
    np.testing.assert_allclose(found, np.log(mean / (1 - mean)), atol=1e-4)


def test_certain_members_give_finite_logits_and_nan_stays() -> None:
    sure = torch.tensor([[500.0, -500.0, 0.0]])
    one = {"calibrations": [(1.0, 0.0)], "weights": [1.0]}
    found = mean_logits([sure], **one)
    assert torch.isfinite(found).all()
    assert found.argsort().tolist() == [[1, 2, 0]]
    assert mean_logits([torch.tensor([[float("nan")]])], **one).isnan().all()


def test_every_order_of_the_library_gives_the_same_value() -> None:
    probs_MNC, targets_NC = data(3, 5)
    values = {
        round(
            select_members(
                torch.from_numpy(probs_MNC[list(order)]),
                torch.from_numpy(targets_NC),
                objective=PRECISION,
                num_picks=5,
            ).value,
            9,
        )
        for order in itertools.permutations(range(3))
    }
    assert len(values) == 1, "average precision has no ties here"
