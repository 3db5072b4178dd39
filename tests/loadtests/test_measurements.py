"""Measurements add up: in parts or whole, in one process or several, in a short run or a long one."""

from __future__ import annotations

import json

import pytest

from loadtests import figures
from loadtests.client import Answer
from loadtests.measurements import SLOTS, Measurements


def answer(sent_s: float, times_s: list[float], tokens: int = 0, error: str = "", left: bool = False) -> Answer:
    """Sent then, with chunks so long after it, ended 10 ms after the last one."""
    times = [sent_s + time_s for time_s in times_s]
    ended_s = (times[-1] if times else sent_s) + 0.01
    return Answer(sent_s, ended_s, times, "", 100 if tokens else 0, 25 if tokens else 0, tokens, error, left)


def take(measurements: Measurements, scenario: str, given: Answer, good: bool = True) -> None:
    measurements.begun(scenario, given.sent_s - 50)
    measurements.ended(scenario, 50, given, good)


def filled() -> Measurements:
    made = Measurements()
    for number in range(40):
        times = [0.1 + number / 1000 + 0.02 * step for step in range(5)]
        take(made, "chat", answer(50 + number / 4, times, tokens=9), good=number % 4 > 0)
    take(made, "chat", answer(52, [], error="429 overloaded"))
    take(made, "chat", answer(53, [0.1], left=True))
    made.begun("chat", 9.9)  # and had no end
    take(made, "rag", answer(51, [0.5]))
    return made


def test_figures_are_what_was_put_in() -> None:
    made = filled()
    found = figures.scenario(made.whole("chat"), 20.0)
    assert (found["requests"], found["sent"], found["cut"], found["left"]) == (40, 43, 1, 1)
    assert found["failed"] == pytest.approx(1 / 41)
    assert (found["good"], found["goodput_rps"]) == (0.75, 1.5)
    assert found["output_tokens_per_s"] == pytest.approx(40 * 9 / 20)
    assert (found["prompt_tokens_mean"], found["output_tokens_mean"]) == (100, 9)
    assert found["cached_share"] == 0.25
    assert found["ttft_p50_ms"] == pytest.approx(119.5, rel=0.011)
    assert found["ttft_p99_ms"] == pytest.approx(139, rel=0.011)
    assert found["itl_mean_ms"] == pytest.approx(20)
    assert found["tpot_mean_ms"] == pytest.approx(90 / 8)
    assert found["e2e_p50_ms"] == pytest.approx(209.5, rel=0.011)
    assert "late_p99_ms" not in found
    assert made.errors == {("chat", "429 overloaded"): 1}


def test_a_server_without_usage_has_no_token_figures() -> None:
    found = figures.scenario(filled().whole("rag"), 20.0)
    assert found["requests"] == 1
    assert not {"output_tokens_per_s", "tpot_mean_ms", "cached_share"} & found.keys()


def test_parts_taken_over_and_over_make_the_whole() -> None:
    whole, parts, merged = filled(), Measurements(), Measurements()
    for number in range(40):
        times = [0.1 + number / 1000 + 0.02 * step for step in range(5)]
        take(parts, "chat", answer(50 + number / 4, times, tokens=9), good=number % 4 > 0)
        if number % 7 == 0:
            merged.merge(json.loads(json.dumps(parts.take())))
            assert parts.slots == {}
    take(parts, "chat", answer(52, [], error="429 overloaded"))
    take(parts, "chat", answer(53, [0.1], left=True))
    parts.begun("chat", 9.9)
    merged.merge(json.loads(json.dumps(parts.take())))
    first, second = (figures.scenario(made.whole("chat"), 20.0) for made in (whole, merged))
    assert first["quantiles"] == second.pop("quantiles")
    assert {key: first[key] for key in second} == pytest.approx(second)
    assert merged.errors == {("chat", "429 overloaded"): 1}


def test_a_long_run_keeps_as_much_as_a_short_one() -> None:
    made = Measurements()
    for second in range(10 * SLOTS):
        made.begun("soak", float(second))
    assert made.slot_s == 16
    assert len(made.slots["soak"]) <= SLOTS
    assert made.whole("soak").counts["begun"] == 10 * SLOTS
    late = Measurements()
    late.begun("soak", 10 * SLOTS + 3.0)
    made.merge(late.take())
    assert made.whole("soak").counts["begun"] == 10 * SLOTS + 1


def test_lateness_is_measured_where_requests_have_times() -> None:
    made = Measurements()
    for number in range(100):
        made.begun("trace", float(number), 0.2 if number < 4 else 0.003)
    found = figures.scenario(made.whole("trace"), 100)
    assert found["late_share"] == 0.04
    assert found["late_p50_ms"] == pytest.approx(3, rel=0.011)
    assert found["late_p99_ms"] == pytest.approx(200, rel=0.011)


def test_what_happened_over_time() -> None:
    made = filled()
    series = figures.series(made, "chat")
    assert series["time_s"] == [float(second) for second in range(10)]
    assert series["sent_per_s"][0] == 4
    assert sum(series["output_tokens_per_s"]) == pytest.approx(40 * 9)
    assert series["ttft_p50_ms"][0] == pytest.approx(101.5, rel=0.02)
    for second in range(1000):
        made.begun("chat", float(second))
    longer = figures.series(made, "chat")
    assert len(longer["time_s"]) <= figures.POINTS
    width = longer["time_s"][1] - longer["time_s"][0]
    assert sum(longer["sent_per_s"]) * width == pytest.approx(1043)


def test_percentiles_that_only_an_slo_asks_for() -> None:
    found = figures.asked_for(
        filled(), "chat", {"ttft_p25_ms": 1.0, "tpot_p99.9_ms": 2.0, "late_p50_ms": 1.0, "failed": 0}
    )
    assert found.keys() == {"ttft_p25_ms", "tpot_p99.9_ms"}
    assert found["ttft_p25_ms"] == pytest.approx(109.5, rel=0.011)
