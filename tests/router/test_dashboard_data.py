"""The data of the dashboard: everything is in it, it is JSON, and nothing of what people wrote is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import orjson
import pytest

from router.dashboard_data import Minute, data, sample_of
from router.flows import Flow
from router.history import History
from tests.router.dashboards import answer, ended, seen


def test_a_deployment_of_which_nothing_is_known_yet() -> None:
    bare = dataclasses.replace(
        seen(0), redis=False, controller=None, minute=Minute(seconds=0), events=(), queue_requests=0, flow=Flow()
    )
    told = json.loads(orjson.dumps(data(bare, History().after(0), ())))
    assert told["workers"] == told["events"] == told["requests"] == told["history"]["samples"] == []
    assert told["controller"] is None
    assert told["redis"] == "unreachable"
    assert told["minute"] == {
        "seconds": 0, "requests_s": 0, "outcomes": {}, "slo_kept": None, "hit_ratio": None, "ttft_ms": None,
        "itl_ms": None,
    }  # fmt: skip


def test_workers_have_role_state_load_and_rates() -> None:
    told = json.loads(orjson.dumps(answer(12)))
    first, lost = told["workers"][0], told["workers"][-2]
    assert (first["id"], first["role"], first["state"]) == ("prefill-0", "prefill", "serving")
    assert first["kv_blocks_used"] + first["running"] > 0
    assert first["prefill_ms"] > 0 < first["decode_ms"]
    assert first["per_second"]["prompt_tokens"] > 0
    assert lost["state"] == "lost"
    assert [lost[name] for name in ("running", "waiting", "kv_blocks", "prefill_ms", "decode_ms")] == [None] * 5


def test_the_last_minute_is_told_beside_its_slo() -> None:
    told = answer(8)
    assert told["slo"] == {"ttft_ms": 2_000.0, "itl_ms": 50.0}
    assert told["minute"]["ttft_ms"] == {"p50": 318.2, "p95": 641.7, "p99": 1_022.4, "count": 412}
    assert told["minute"]["requests_s"] == pytest.approx(412 / 60)
    assert told["controller"]["moves_total"] == 1
    assert [event["kind"] for event in told["events"]] == ["scale", "scale", "role", "role", "failure", "recovery"]


def test_requests_come_with_their_placement_in_milliseconds() -> None:
    request = answer(8)["requests"][-1]
    assert request["number"] == 50
    assert request["age_s"] == 2.0
    assert not {"ended_s", "prompt", "text"} & request.keys()
    (decision,) = request["decisions"]
    for terms in (decision["chosen"], decision["runner_up"]):
        parts = ("queue_ms", "prefill_ms", "fetch_ms", "handoff_ms", "decode_ms", "others_ms")
        assert sum(terms[name] for name in parts) == pytest.approx(terms["total_ms"], abs=0.01)
    assert len(request["tenant"]) == 16


def test_a_large_deployment_is_told_in_a_second() -> None:
    """64 workers, ten minutes and fifty requests; what comes every second after that is the workers alone."""
    whole = len(orjson.dumps(answer(64)))
    again = data(seen(64), History().after(0), ended(1))
    assert whole < 250_000
    assert len(orjson.dumps(again)) < 50_000


def test_the_documentation_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text()
    assert [name for name in answer(2) if f"`{name}`" not in text] == []


def test_a_sample_sums_over_the_workers_that_are_there() -> None:
    found = sample_of(seen(12))
    told = answer(12)
    loads = [worker for worker in told["workers"] if worker["state"] == "serving"]
    assert (found.prefill, found.decode, found.both) == (6, 5, 0)
    assert found.running == sum(worker["running"] for worker in loads)
    assert found.waiting == sum(worker["waiting"] for worker in loads) + told["queue"]["requests"]
    used, blocks = (sum(worker[name] for worker in loads) for name in ("kv_blocks_used", "kv_blocks"))
    assert found.kv_used == pytest.approx(used / blocks)
    assert (found.ttft_p50_ms, found.itl_p95_ms) == (318.2, 37.9)
    nothing = sample_of(dataclasses.replace(seen(0), minute=Minute()))
    assert (nothing.kv_used, nothing.ttft_p95_ms, nothing.itl_p50_ms, nothing.hit_ratio) == (None,) * 4
