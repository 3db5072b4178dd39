import math

import pytest

from loadtests.simulator.histogram import Histogram


def test_mean_is_exact_and_quantiles_within_half_a_per_cent() -> None:
    histogram = Histogram()
    for value in range(1, 1001):
        histogram.add(float(value))
    assert histogram.count == 1000
    assert histogram.mean == pytest.approx(500.5)
    assert histogram.quantile(0.5) == pytest.approx(500, rel=0.011)
    assert histogram.quantile(0.99) == pytest.approx(990, rel=0.011)


@pytest.mark.parametrize(("first", "slope", "steps"), [(7.0, 0.0, 5), (7.0, 0.01, 1), (7.0, 0.3, 400), (0.2, 3.0, 50)])
def test_a_line_is_its_values(first: float, slope: float, steps: int) -> None:
    line, single = Histogram(), Histogram()
    line.add_line(first, slope, steps, 3)
    for step in range(steps):
        single.add(first + slope * step, 3)
    assert line.count == single.count
    assert line.mean == pytest.approx(single.mean)
    for share in (0.1, 0.5, 0.9, 1.0):
        assert line.quantile(share) == pytest.approx(single.quantile(share), rel=0.011)
    assert line.points()[-1][1] == 1.0


def test_an_empty_one_says_nothing() -> None:
    assert Histogram().mean == Histogram().quantile(0.5) == 0.0
    assert Histogram().points() == []


def test_scatter_keeps_the_mean_and_widens_the_tails() -> None:
    gaps = Histogram()
    gaps.add(40.0, 1000)
    same, wide = gaps.scattered(0.0), gaps.scattered(0.2)
    assert same is gaps
    assert wide.mean == gaps.mean
    sigma = 0.2 * math.sqrt(math.pi / 2)
    for share, deviations in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816)):
        expected = 40.0 * math.exp(deviations * sigma - sigma**2 / 2)
        assert wide.quantile(share) == pytest.approx(expected, rel=0.02)
    assert wide.points()[-1][1] == pytest.approx(1.0)
