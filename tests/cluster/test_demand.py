import pytest

from cluster.demand import LONG_S, DemandMeter
from cluster.messages import RouterInfo
from cluster.pools import Demand


def router(
    name: str = "a",
    requests: int = 0,
    prompt: int = 0,
    uncached: int = 0,
    output: int = 0,
    pid: int = 1,
    waiting: int = 0,
    ttft: float = 0.0,
) -> RouterInfo:
    return RouterInfo(name, "ns", pid, requests, prompt, uncached, output, waiting, 100 * waiting, ttft, ttft / 10)


def steady(name: str, seconds: float, per_s: int = 10) -> RouterInfo:
    requests = int(seconds * per_s)
    return router(name, requests, 100 * requests, 40 * requests, 20 * requests)


def test_nothing_is_asked_for_before_anything_was_seen() -> None:
    assert DemandMeter().demand() == Demand()


def test_rates_are_differences_of_the_counters_per_second() -> None:
    meter = DemandMeter()
    for second in range(100, 121):  # the router has lived before this began
        meter.observe([steady("a", second)], float(second))
    demand = meter.demand()
    assert demand.requests_s == pytest.approx(10)
    assert demand.prompt_tokens_s == pytest.approx(1000)
    assert demand.uncached_tokens_s == pytest.approx(400)
    assert demand.output_tokens_s == pytest.approx(200)
    assert demand.requests == 200


def test_routers_add_up_and_one_that_comes_late_brings_no_past() -> None:
    meter = DemandMeter()
    for second in range(60):
        routers = [steady("a", second)]
        if second >= 20:
            routers.append(steady("b", second + 100_000))
        meter.observe(routers, float(second))
    assert meter.demand().requests_s == pytest.approx(20)


def test_a_router_that_leaves_takes_nothing_away() -> None:
    meter = DemandMeter()
    for second in range(60):
        meter.observe([steady("a", second)] + [steady("b", second)] * (second < 20), float(second))
    assert meter.demand().requests_s == pytest.approx(10)


@pytest.mark.parametrize("pid", [1, 2])
def test_a_router_that_began_anew_counts_from_nothing(pid: int) -> None:
    meter = DemandMeter()
    meter.observe([router(requests=1000, output=5000)], 0.0)
    meter.observe([router(requests=1010, output=5100)], 5.0)
    meter.observe([router(requests=20, output=100, pid=pid)], 10.0)
    demand = meter.demand()
    assert demand.requests_s == pytest.approx((10 + 20) / 10)
    assert demand.output_tokens_s == pytest.approx((100 + 100) / 10)


def test_a_change_is_seen_within_seconds_and_chance_is_not_taken_for_one() -> None:
    meter = DemandMeter()
    requests = 0
    for half in range(120):
        requests += 10 if half % 3 else 13  # about as uneven as arrivals by chance
        meter.observe([router(requests=requests, uncached=100 * requests, output=10 * requests)], half / 2)
    assert meter.demand().requests == pytest.approx(22 * LONG_S, rel=0.05)
    output = 10 * requests
    for half in range(120, 127):
        requests += 11
        output += 11 * 100
        meter.observe([router(requests=requests, uncached=100 * requests, output=output)], half / 2)
    assert meter.demand().output_tokens_s == pytest.approx(22 * 100, rel=0.05)


def test_what_waits_has_arrived_and_serving_it_is_no_demand() -> None:
    """Ten requests a second, of which half wait; then nobody comes any more and the queue is served."""
    meter = DemandMeter()
    for second in range(20):
        meter.observe([router(requests=5 * second, uncached=500 * second, waiting=5 * second)], float(second))
    demand = meter.demand()
    assert demand.requests_s == pytest.approx(10)
    assert demand.uncached_tokens_s == pytest.approx(1000)
    for second in range(20, 40):
        left = max(0, 95 - 5 * (second - 19))
        served = 190 - left
        meter.observe([router(requests=served, uncached=100 * served, waiting=left)], float(second))
    assert meter.demand().requests_s == pytest.approx(10 / 3, abs=0.5)  # what came in the first third of half a minute


def test_what_waited_and_was_given_up_makes_no_negative_demand() -> None:
    meter = DemandMeter()
    meter.observe([router(waiting=50)], 0.0)
    meter.observe([router()], 5.0)
    assert (meter.demand().requests_s, meter.demand().uncached_tokens_s) == (0.0, 0.0)


def test_a_pause_ends_the_rates() -> None:
    meter = DemandMeter()
    for second in range(100):
        meter.observe([steady("a", min(second, 20))], float(second))
    assert meter.demand().requests_s == 0


def test_what_waits_is_added_up_and_times_are_of_those_that_have_any() -> None:
    meter = DemandMeter()
    meter.observe([router("a", waiting=2, ttft=100.0), router("b", waiting=3, ttft=300.0), router("c")], 0.0)
    demand = meter.demand()
    assert (demand.waiting, demand.waiting_tokens) == (5, 500)
    assert (demand.ttft_ms, demand.itl_ms) == (200.0, 20.0)
