"""Every experiment runs on a small trace, and its result has the shape that the papers report where that is cheap."""

from __future__ import annotations

import pytest

from loadtests.experiments.cache import cache
from loadtests.experiments.disaggregation import goodput
from loadtests.experiments.ladder import RUNGS, ladder
from loadtests.experiments.ppd import WAYS, ways
from loadtests.simulator.generators import generate
from loadtests.simulator.traffic import traffic


def test_the_more_the_scheduler_knows_the_sooner_the_first_token() -> None:
    rows, results = ladder(generate("agents:rate=5,seconds=120"), 5, 3, seed=0)
    times = {row["scheduler"]: row["TTFT mean (s)"] for row in rows}
    assert list(times) == list(RUNGS)
    assert times["random"] > times["least loaded"] > times["local prefixes"] > times["global prefixes"]
    assert [result["name"] for result in results] == list(RUNGS)


def test_larger_caches_hit_more_and_never_more_than_is_possible() -> None:
    trace = generate("sessions:rate=1,seconds=40,first=8000,new=500,turns=5,block=512")
    rows, _ = cache(trace, 2, 2, seed=0)
    alone = [row["one cache, hit (%)"] for row in rows]
    assert alone == sorted(alone)
    assert alone[-1] > alone[0]
    assert max(alone) <= 100 * traffic(trace).hit_ratio + 1e-9


def test_goodput_is_the_highest_rate_that_attains_interpolated() -> None:
    assert goodput([(1.0, {50.0: 1.0}), (2.0, {50.0: 0.8})], 50.0) == pytest.approx(1.5)
    assert goodput([(1.0, {50.0: 1.0}), (2.0, {50.0: 0.95})], 50.0) == pytest.approx(2.0)
    assert goodput([(1.0, {50.0: 0.5}), (2.0, {50.0: 0.2})], 50.0) == 0.0


def test_appending_saves_what_recomputing_the_answer_costs() -> None:
    trace = generate("sessions:rate=1,turns=5,first=2000,new=200,output=400,think=10,seconds=60")
    rows = {row["later turns"]: row for row in ways(trace, seed=0)[0]}
    assert list(rows) == list(WAYS)
    later = {name: row["turn 2+ TTFT mean (ms)"] for name, row in rows.items()}
    assert later["append"] < later["split"] < later["split, nothing kept"]
    assert rows["split"]["appended (%)"] == 0
    assert rows["aggregated"]["appended (%)"] == 100
