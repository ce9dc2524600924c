"""Confidence intervals of rates and means."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.evaluation.intervals import bootstrap_mean, wilson

Z = 1.959963984540054
COUNTS = st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (8, 10, 0.490162, 0.943318),
        (0, 20, 0.0, 0.161125),
        (20, 20, 0.838875, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson_known_values(count: int, total: int, low: float, high: float) -> None:
    found = wilson(count, total)
    assert (found.value, found.low, found.high) == pytest.approx((count / total, low, high), abs=1e-6)


def test_wilson_of_nothing() -> None:
    found = wilson(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)


@given(COUNTS)
def test_wilson_ends_are_where_the_score_test_stands_at_five_percent(numbers: tuple[int, int]) -> None:
    count, total = numbers
    found = wilson(count, total)
    for end in (found.low, found.high):
        assert (found.value - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / total, abs=1e-9)


@given(COUNTS)
def test_wilson_contains_the_share_and_stays_a_rate(numbers: tuple[int, int]) -> None:
    found = wilson(*numbers)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.low < found.high


@given(COUNTS)
def test_wilson_mirrors(numbers: tuple[int, int]) -> None:
    count, total = numbers
    one, other = wilson(count, total), wilson(total - count, total)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12)


@pytest.mark.parametrize("total", [1, 20, 153])
def test_wilson_rises_with_the_count(total: int) -> None:
    found = [wilson(count, total) for count in range(total + 1)]
    for end in ("low", "high"):
        ends = [getattr(estimate, end) for estimate in found]
        assert ends == sorted(ends)
        assert len(set(ends)) == len(ends)


def test_wilson_narrows_with_more_data() -> None:
    widths = [wilson(3 * n, 10 * n) for n in (1, 2, 10, 100)]
    sizes = [estimate.high - estimate.low for estimate in widths]
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_bootstrap_is_deterministic_and_contains_the_mean(values: list[float]) -> None:
    found = bootstrap_mean(values)
    assert found == bootstrap_mean(tuple(values))
    assert found.value == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert min(values) - 1e-9 <= found.low
    assert found.high <= max(values) + 1e-9


def test_bootstrap_narrows_with_more_data() -> None:
    few, some, many = (bootstrap_mean([0.0, 1.0, 2.0, 5.0] * n) for n in (2, 10, 100))
    widths = [estimate.high - estimate.low for estimate in (few, some, many)]
    assert widths[0] > widths[1] > widths[2] > 0


def test_bootstrap_is_near_the_normal_interval() -> None:
    values = [((7 * index) % 101) / 101 for index in range(404)]
    half = Z * statistics.pstdev(values) / math.sqrt(len(values))
    found = bootstrap_mean(values)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.value == pytest.approx(half, rel=0.1)


def test_bootstrap_seeds_and_corner_cases() -> None:
    values = [0.0, 1.0, 2.0, 5.0, 11.0, 3.3]
    assert bootstrap_mean(values, resamples=50) != bootstrap_mean(values, resamples=50, seed=1)
    same = bootstrap_mean([0.5])
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    assert all(math.isnan(x) for x in (bootstrap_mean([]).value, bootstrap_mean([]).low, bootstrap_mean([]).high))
