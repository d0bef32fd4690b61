"""What is kept of a machine's speeds, and how sure one can be of it."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest

from core.errors import InputError
from tuner.budgets.calibration import (
    FEW_FACTOR,
    FILE,
    KEPT,
    LEAST_FACTOR,
    NOTHING,
    Calibration,
    Estimate,
    fit_line,
    learn,
    read_calibration,
    within,
)


def test_a_number_is_the_median_within_what_was_seen() -> None:
    known = Calibration({"a": [2.0], "b": [1.0, 1.0, 1.0], "c": [1.0, 2.0, 4.0], "d": [(1, 2)]})
    assert known.number("a") == within(2.0, FEW_FACTOR)
    assert known.number("b") == within(1.0, LEAST_FACTOR)
    spread = known.number("c")
    assert spread is not None and spread.value == 2.0
    # Two standard deviations of the logarithms.
    assert spread.high == pytest.approx(2 * math.exp(2 * math.log(2)))
    assert spread.low == pytest.approx(2 / math.exp(2 * math.log(2)))
    assert known.number("d") is None and known.number("x") is None and known.line("a") is None
    assert set(known.numbers("")) == {"a", "b", "c"}


def test_estimates_add_and_scale() -> None:
    total = Estimate(low=1, value=2, high=4) + within(10, 2) * 3
    assert (total.low, total.value, total.high) == (16, 32, 64)
    assert NOTHING + total == total


def test_a_line_is_found_again() -> None:
    x = np.array([1.0, 5.0, 10.0, 40.0, 80.0])
    line = fit_line([(a, 3.0 + 1.5 * a) for a in x])
    assert (line.fixed, line.slope) == (pytest.approx(3.0), pytest.approx(1.5))
    assert line.factor == LEAST_FACTOR
    # The oracle: numpy's weighted polynomial, on pairs with noise.
    noise = np.random.default_rng(0).uniform(0.8, 1.25, 5)
    y = (3.0 + 1.5 * x) * noise
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    fitted = fit_line(list(zip(x, y, strict=True)))
    assert (fitted.fixed, fitted.slope) == (pytest.approx(fixed), pytest.approx(slope))
    assert fitted.factor > LEAST_FACTOR
    two = line(10.0, times=2)
    assert two.value == pytest.approx(2 * 3.0 + 15.0)


@pytest.mark.parametrize(
    ("pairs", "fixed", "slope"),
    [
        ([(2.0, 5.0)], 3.0, 1.0),
        ([(2.0, 5.0), (2.1, 5.0), (2.2, 5.4)], 3.0, 1.0),  # They say nothing of the slope.
        ([(2.0, 1.0)], 0.0, 1.0),
    ],
)
def test_few_pairs_make_a_careful_line(
    pairs: list[tuple[float, float]], fixed: float, slope: float
) -> None:
    line = fit_line(pairs)
    assert (line.fixed, line.slope) == (pytest.approx(fixed), slope)


@pytest.mark.parametrize("pairs", [[(1, 10), (5, 6), (20, 4)], [(1, 0.2), (10, 8), (40, 60)]])
def test_no_term_of_a_line_is_negative(pairs: list[tuple[float, float]]) -> None:
    line = fit_line(pairs)
    assert line.fixed >= 0 and line.slope >= 0
    assert all(line(x).value > 0 for x, _ in pairs)


def test_studies_that_end_at_once_keep_all_and_the_last_count(tmp_path: Path) -> None:
    def end(number: int) -> None:
        learn(tmp_path, [("a", float(number)), (f"own {number}", (1.0, 2.0))])

    threads = [threading.Thread(target=end, args=(number,)) for number in range(1, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = read_calibration(tmp_path)
    kept = known.to_dict()["speeds"]
    assert isinstance(kept, dict)
    assert len(kept["a"]) == KEPT and all(f"own {n}" in kept for n in range(1, 25))
    learn(tmp_path, [("a", 99.0)] * KEPT)
    number = read_calibration(tmp_path).number("a")
    assert number is not None and number.value == 99.0, "machines change"
    assert read_calibration(tmp_path / "elsewhere").number("a") is None
    learn(tmp_path / "not there", [])  # Nothing to keep: nothing is touched.


@pytest.mark.parametrize("text", ["{", '{"format": 7, "speeds": {}}', '{"format": 1, "speeds": 3}'])
def test_a_damaged_file_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match=r"is damaged(.|\n)*remove it"):
        read_calibration(tmp_path)
