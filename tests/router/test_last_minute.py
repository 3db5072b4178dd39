"""Exact while a second has few values, fair and bounded when it has many, and about one minute only."""

from __future__ import annotations

import pytest

from router.last_minute import KEPT, SPAN_S, LastMinute


def test_nothing_observed_has_no_summary() -> None:
    times = LastMinute()
    assert times.percentiles(5.0) is None
    assert times.sums(5.0) == (0, 0.0)
    times.observe(1.0, 5.0)
    assert times.percentiles(5.0 + SPAN_S + 1) is None


def test_percentiles_are_of_what_was_observed() -> None:
    times = LastMinute()
    for value in range(1, 101):
        times.observe(float(value), 10.0 + value / 4)  # four a second
    found = times.percentiles(36.0)
    assert found is not None
    assert times.sums(36.0) == (found.count, 5050.0) == (100, 5050.0)
    assert (found.p50, found.p95, found.p99) == (50.0, 95.0, 99.0)


def test_what_is_older_than_a_minute_is_gone() -> None:
    times = LastMinute()
    times.observe(1_000.0, 0.5)
    times.observe(1.0, 30.0)
    times.observe(2.0, SPAN_S + 5.0)
    found = times.percentiles(SPAN_S + 5.0)
    assert found is not None
    assert (found.count, found.p50, found.p99) == (2, 1.0, 2.0)
    assert times.sums(SPAN_S + 5.0) == (2, 3.0)


def test_a_busy_second_weighs_as_much_as_it_had() -> None:
    """10,000 values of one second and 10 of another: the ten are the highest thousandth, whatever is kept of both."""
    times = LastMinute()
    for number in range(10_000):
        times.observe(number / 10_000, 1.5)
    for _ in range(10):
        times.observe(50.0, 2.5)
    found = times.percentiles(3.0)
    assert found is not None
    assert found.count == 10_010
    assert found.p50 == pytest.approx(0.5, abs=0.25)
    assert found.p99 <= 1.0


def test_no_traffic_makes_it_larger() -> None:
    times = LastMinute()
    for number in range(200_000):
        times.observe(1.0, number / 100)
    assert len(times._slices) <= SPAN_S + 1
    assert all(len(piece.kept) <= KEPT for piece in times._slices)
