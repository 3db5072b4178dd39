"""`/dashboard` and its data over HTTP, with a real router and scripted workers."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.messages import ControllerInfo
from kvstore.hashing import tenant_tag
from tests.router.fakes import NAMESPACE, SECRET
from tests.router.harness import Api

LIMIT = 200_000  # bytes
TENANT = {"authorization": "Bearer tenant-key"}
OPERATOR = {"authorization": "Bearer operator-kéy".encode()}


@pytest.fixture(scope="module", autouse=True)
def often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.dashboard.SAMPLE_S", 0.02)
        yield


@pytest.fixture
def fresh(model_directory: Path) -> Iterator[Api]:
    with Api(model_directory).serving("pd") as one:
        yield one


@pytest.fixture(scope="module")
def guarded(model_directory: Path) -> Iterator[Api]:
    with Api(model_directory).serving("b", api_keys=("tenant-key",), operator_key="operator-kéy") as one:
        yield one


def told(api: Api, **cursors: int) -> dict[str, Any]:
    answer = api.http.get("/dashboard/data", params=cursors)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def until(api: Api, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    api.wait(lambda: condition(told(api)))
    return told(api)


def test_the_page_is_one_small_file_that_asks_nobody_else(api: Api) -> None:
    page = api.http.get("/dashboard")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert len(page.content) < LIMIT
    assert set(re.findall(r"https?://[^'\"\s]+", page.text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert re.findall(r"(?:src|href)=\"(?!data:)", page.text) == []
    assert 'data-operator-key="open"' in page.text


def test_the_policy_lets_only_the_pages_own_style_and_script_run(api: Api) -> None:
    page = api.http.get("/dashboard")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    for tag in ("style", "script"):
        ((text),) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_request_is_told_with_its_placement_and_without_its_text(api: Api) -> None:
    text = "hello hello the quick brown fox"
    assert api.complete(prompt=text, max_tokens=5).is_success
    data = until(api, lambda data: data["requests"] and data["minute"]["outcomes"].get("finished"))
    request = data["requests"][-1]
    assert (request["outcome"], request["output_tokens"]) == ("finished", 5)
    assert request["ttft_ms"] <= request["total_ms"]
    assert request["decisions"][-1]["route"] == {"prefill": "p1", "decode": "d1"}
    assert data["minute"]["ttft_ms"]["count"] >= 1
    assert data["minute"]["hit_ratio"] == 0.0
    assert data["minute"]["slo_kept"] == 1.0
    assert "quick" not in api.http.get("/dashboard/data").text


def test_only_what_is_new_is_told_again(api: Api) -> None:
    assert api.complete(max_tokens=2).is_success
    first = until(api, lambda data: data["requests"] and data["history"]["last"] > 2)
    number, sample = first["requests"][-1]["number"], first["history"]["last"]
    assert [len(row) == len(first["history"]["columns"]) for row in first["history"]["samples"]] != []
    assert api.complete(max_tokens=2).is_success
    new = told(api, request=number, sample=sample)
    assert [request["number"] for request in new["requests"]] == [number + 1]
    assert len(new["history"]["samples"]) == new["history"]["last"] - sample
    assert api.http.get("/dashboard/data?sample=-1").status_code == 400


def test_a_role_is_told_with_the_workers_next_word(fresh: Api) -> None:
    worker = fresh.workers["d1"]
    worker.load = {"role": "both"}  # type: ignore[dict-item]
    data = until(fresh, lambda data: [w["role"] for w in data["workers"]] == ["both", "prefill"])
    assert [w["state"] for w in data["workers"]] == ["serving", "serving"]
    until(fresh, lambda data: data["history"]["samples"][-1][:3] == [1, 0, 1])


def test_a_lost_worker_is_an_event(fresh: Api) -> None:
    until(fresh, lambda data: data["history"]["last"] > 0)
    fresh.run(fresh.workers["d1"].die())
    data = until(fresh, lambda data: data["events"])
    assert [(event["kind"], event["words"]) for event in data["events"]] == [("failure", "d1 is lost")]
    assert [(w["id"], w["state"], w["running"]) for w in data["workers"]] == [
        ("d1", "lost", None),
        ("p1", "serving", 0),
    ]


def test_one_that_has_left_the_membership_drains(fresh: Api) -> None:
    worker = fresh.workers["p1"]
    worker.hold_at = 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fresh.complete, max_tokens=2)
        fresh.wait(lambda: worker.running)
        fresh.membership.workers = [fresh.workers["d1"].info]
        states = {"d1": "serving", "p1": "draining"}
        until(fresh, lambda data: {w["id"]: w["state"] for w in data["workers"]} == states)
        fresh.set(worker.go.set)
        assert answer.result(20).is_success
    data = until(fresh, lambda data: [w["id"] for w in data["workers"]] == ["d1"])
    assert data["events"] == []


def test_what_the_controller_says_and_redis_does_not(fresh: Api) -> None:
    lines = ("12:00:00 1 to prefill: the busier pool is 90% busy", "12:00:00 d1 turns to prefill")
    fresh.membership.controllers = [ControllerInfo("controller", NAMESPACE, 5, 1, 2, 3, 4, 5, 6, 7.5, lines)]
    data = until(fresh, lambda data: len(data["events"]) == 2)
    assert data["controller"]["starting"] == 5
    assert [event["at"] for event in data["events"]] == ["12:00:00", "12:00:00"]
    fresh.membership.error = ConnectionError("down")
    data = until(fresh, lambda data: len(data["events"]) == 3)
    assert (data["redis"], data["controller"]) == ("unreachable", None)
    fresh.membership.error = None
    until(fresh, lambda data: data["redis"] == "reachable" and data["controller"])


def test_who_waits_is_told(model_directory: Path) -> None:
    with Api(model_directory).serving("b", max_sequences=1, max_queue=1) as api, ThreadPoolExecutor(5) as pool:
        worker = api.workers["b1"]
        worker.hold_at = 0
        answers = [pool.submit(api.complete, max_tokens=2) for _ in range(5)]
        data = until(api, lambda data: data["queue"]["requests"] == 1 and data["minute"]["outcomes"])
        assert data["queue"]["tokens"] > 0
        assert set(data["minute"]["outcomes"]) == {"server_overloaded"}
        api.set(worker.go.set)
        assert {answer.result(20).status_code for answer in answers} == {200, 429}


def test_with_keys_the_data_is_the_operators_and_the_page_asks_for_the_key(guarded: Api) -> None:
    for headers in ({}, TENANT, {"authorization": "Bearer wrong"}):
        answer = guarded.http.get("/dashboard/data", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    data = guarded.http.get("/dashboard/data", headers=OPERATOR)
    assert data.status_code == 200
    assert data.headers["cache-control"] == "no-store"
    page = guarded.http.get("/dashboard")
    assert page.status_code == 200
    assert 'data-operator-key="needed"' in page.text
    assert "operator-kéy" not in page.text


def test_a_tenant_is_a_tag(guarded: Api) -> None:
    body = {"prompt": "hello", "max_tokens": 2}
    assert guarded.http.post("/v1/completions", json=body, headers=TENANT).is_success
    answer = guarded.http.get("/dashboard/data", headers=OPERATOR)
    tag = tenant_tag(SECRET, hashlib.sha256(b"tenant-key").hexdigest())
    assert [request["tenant"] for request in answer.json()["requests"]] == [tag]
    assert "tenant-key" not in answer.text


def test_with_tenants_and_no_operator_key_it_is_closed(model_directory: Path) -> None:
    with Api(model_directory).serving("b", api_keys=("tenant-key",)) as api:
        answer = api.http.get("/dashboard/data", headers=TENANT)
        assert answer.status_code == 403
        assert "TANDEM_OPERATOR_KEY" in answer.json()["error"]["message"]
        assert 'data-operator-key="open"' in api.http.get("/dashboard").text
