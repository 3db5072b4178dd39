"""Requests that wait in the router, over HTTP: priorities, deadlines, clients that leave, fleets that come late; and
what the router tells of them: its report in Redis, and the trace."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cluster.membership import Membership
from cluster.messages import RouterInfo
from kvstore.redis_server import EmbeddedRedis
from loadtests.simulator.trace import load
from tests.router.fakes import NAMESPACE
from tests.router.harness import Api

FULL = {"running": 64}  # of one that runs at most one


@pytest.fixture(scope="module")
def narrow(model_directory: Path) -> Iterator[Api]:
    """One worker with one slot, and tenants."""
    keys = {"api_keys": ("first", "second"), "operator_key": "operator"}
    with Api(model_directory).serving("b", max_sequences=1, max_queue=4, **keys) as one:
        yield one


@pytest.fixture(autouse=True)
def open_again(narrow: Api) -> Iterator[None]:
    yield
    narrow.reset()
    narrow.wait(lambda: busy(narrow) == 0)


def busy(api: Api) -> int:
    worker = api.http.get("/status").json()["workers"][0]
    return int(worker["running"])


def shut(api: Api) -> None:
    """From now on requests wait."""
    api.workers["b1"].load = FULL
    api.wait(lambda: busy(api) == 64)


def waiting(api: Api) -> int:
    lines = [line for line in api.http.get("/metrics").text.splitlines() if line.startswith("tandem_queue_requests")]
    return round(sum(float(line.split()[-1]) for line in lines))


def send(api: Api, prompt: int, key: str = "first", **body: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | ({"x-tandem-operator-key": "operator"} if key == "first" else {})
    return api.http.post("/v1/completions", json={"prompt": [prompt] * 3, "max_tokens": 1} | body, headers=headers)


def test_who_may_ask_for_which_priority(narrow: Api) -> None:
    assert send(narrow, 5, priority=-1).is_success
    assert send(narrow, 5, key="second", priority=1).is_success
    refused = send(narrow, 5, key="second", priority=-1)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "permission_denied"
    assert refused.json()["error"]["param"] == "priority"
    for wrong in (1.5, "high", 101, -101):
        answer = send(narrow, 5, priority=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


def test_without_keys_anybody_may_go_first(api: Api) -> None:
    assert api.complete(priority=-5, max_tokens=1).is_success


def test_priorities_and_tenants_are_served_in_order(narrow: Api) -> None:
    shut(narrow)
    served: list[Future[httpx.Response]] = []
    with ThreadPoolExecutor(4) as pool:
        for number, (key, priority) in enumerate([("first", 5), ("first", 0), ("first", 0), ("second", 0)]):
            served.append(pool.submit(send, narrow, 10 + number, key, priority=priority))
            narrow.wait(lambda: waiting(narrow) == len(served))
        narrow.workers["b1"].load = {}
        assert all(answer.result(10).is_success for answer in served)
    order = [generation.prompt[0] for generation in narrow.workers["b1"].generations]
    assert order == [11, 13, 12, 10]


def test_a_deadline_that_cannot_be_met(narrow: Api) -> None:
    assert send(narrow, 5, ttft_deadline_ms=5_000).is_success
    narrow.workers["b1"].load = {"waiting_tokens": 100_000}
    narrow.wait(lambda: send(narrow, 5, ttft_deadline_ms=5_000).status_code == 429)
    refused = send(narrow, 5, ttft_deadline_ms=5_000)
    assert "within 5000 ms" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    for wrong in (0, -1, "soon"):
        answer = send(narrow, 5, ttft_deadline_ms=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "ttft_deadline_ms")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits(narrow: Api, stream: bool) -> None:
    shut(narrow)
    body = {"prompt": "x", "stream": stream}
    headers = {"authorization": "Bearer first"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{narrow.url}/v1/completions", json=body, headers=headers, timeout=0.2)
    narrow.wait(lambda: waiting(narrow) == 0)
    assert 'tandem_requests_total{outcome="cancelled"} 0.0' not in narrow.http.get("/metrics").text
    assert narrow.workers["b1"].jobs == []


def test_a_fleet_that_comes_late(model_directory: Path) -> None:
    """From zero a request waits for the first worker; elsewhere it is told to come back."""
    late = Api(model_directory)
    with late.serving("", scale="0..2", prefill=0) as api, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.complete, prompt=[7, 8], max_tokens=2)
        api.wait(lambda: waiting(api) == 1)
        api.run(api._start_workers("b"))
        assert answer.result(10).json()["usage"]["completion_tokens"] == 2
    with Api(model_directory).serving("") as api:
        assert api.complete().status_code == 503


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    yield server
    server.close()


def test_the_report_and_the_trace(model_directory: Path, tmp_path: Path, redis: EmbeddedRedis) -> None:
    api = Api(model_directory)
    api.settings = replace(api.settings, redis_url=redis.url)
    system = list(range(10, 42))  # two blocks
    with api.serving("pd", trace=str(tmp_path / "trace"), block_size=16) as served:
        for number in range(3):
            assert served.complete(prompt=[*system, 100 + number], max_tokens=3, priority=number).is_success
        for worker in served.workers.values():
            worker.cached_tokens = 16
        assert served.complete(prompt=system, max_tokens=1, stream=True).is_success
        report = wait_for_report(redis.url, 4)
    assert reports(redis.url) == []  # it said goodbye
    assert report.prompt_tokens_total == 3 * 33 + 32
    assert report.uncached_tokens_total == 3 * 33 + 16
    assert report.output_tokens_total == 10
    assert report.waiting == report.waiting_tokens == 0
    assert report.ttft_ms > 0
    check_trace(tmp_path / "trace")


def reports(url: str) -> list[RouterInfo]:
    async def ask() -> list[RouterInfo]:
        membership = Membership(url)
        try:
            return (await membership.reports(NAMESPACE))[0]
        finally:
            await membership.close()

    return asyncio.run(ask())


def wait_for_report(url: str, requests: int) -> RouterInfo:
    deadline = time.monotonic() + 5
    while True:
        for report in reports(url):
            if report.requests_total == requests:
                return report
        assert time.monotonic() < deadline, "no such report"


def check_trace(folder: Path) -> None:
    (file,) = folder.iterdir()
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert header == {"tandem_trace": 1, "block_size": 16}
    assert [line["prompt_tokens"] for line in lines] == [33, 33, 33, 32]
    assert [line["output_tokens"] for line in lines] == [3, 3, 3, 1]
    assert [line["priority"] for line in lines] == [0, 1, 2, 0]
    assert [line["cached_tokens"] for line in lines] == [0, 0, 0, 16]
    assert [len(line["blocks"]) for line in lines] == [3, 3, 3, 2]
    assert len({tuple(line["blocks"][:2]) for line in lines}) == 1
    assert len({line["blocks"][2] for line in lines[:3]}) == 3
    assert {line["decode"] for line in lines} <= {"d1", "p1"}
    assert all(line["ttft_ms"] > 0 and line["arrival_ms"] >= 0 for line in lines)
    assert len(load(file).requests) == 4  # `tandem simulate` reads it
