"""What operators see: /metrics, /status with stores, keys, a Redis that is down."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.messages import ControllerInfo, StoreInfo
from cluster.rpc import Server
from cluster.store_messages import StatRequest, StoreStat
from kvstore.hashing import tenant_tag
from kvstore.index import IndexWriter
from kvstore.redis_server import EmbeddedRedis
from kvstore.slabs import Change
from tests.router.fakes import NAMESPACE, SECRET
from tests.router.harness import Api

STAT = StoreStat(
    10, 4, 1, 2, 3, 0, 1, 4096, 7, 100, 5, 6, pinned=11, disk_blocks=12, disk_bytes=13, disk_limit_bytes=14,
    disk_writes_total=15, disk_reads_total=16, disk_errors_total=17, found_blocks_total=18, missed_blocks_total=19,
    fetched_blocks_total=20, corrupt_total=21,
)  # fmt: skip
OFFLOAD = {
    "fetched_memory_tokens_total": 31,
    "fetched_disk_tokens_total": 32,
    "fetched_remote_tokens_total": 33,
    "fetched_bytes_total": 34,
    "fetch_seconds_total": 35,
    "fetch_failures_total": 36,
    "recomputed_tokens_total": 37,
    "offloaded_blocks_total": 38,
    "offload_failures_total": 39,
}


@pytest.fixture(scope="module")
def guarded(model_directory: Path) -> Iterator[Api]:
    """A router that asks for keys, with a store."""
    api = Api(model_directory)
    with api.serving("b", api_keys=("first-key", "second-kéy"), max_queue=3, max_sequences=1) as one:

        async def stat(_: StatRequest, __: Any) -> StoreStat:
            return STAT

        async def store() -> Server:
            server = Server(SECRET, {"Stat": stat}, {})
            address = await server.start("127.0.0.1")
            api.membership.stores = [StoreInfo("store-1", address, "node-1", 77, NAMESPACE, 7)]
            return server

        server = api.run(store())
        api.wait(lambda: api.http.get("/status").json()["stores"])
        yield one
        api.run(server.stop())


def samples(api: Api) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, label values by label name) -> value; parsing fails on a page Prometheus would not read."""
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    return {
        (s.name, tuple(value for _, value in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def test_what_the_controller_says_is_in_the_status(api: Api) -> None:
    assert api.http.get("/status").json()["controller"] is None
    info = ControllerInfo("controller", NAMESPACE, 5, 1, 2, 3, 4, 5, 6, 7.5, ("12:00:00 decode-0 turns to prefill",))
    api.membership.controllers = [info]
    try:
        status = api.http.get("/status").json()
        assert status["controller"] == {**dataclasses.asdict(info), "events": list(info.events)}
        assert all(len(worker["rates"]["prefill"]) == 3 for worker in status["workers"])
    finally:
        api.membership.controllers = []


def test_metrics_of_workers_and_requests(api: Api) -> None:
    before = samples(api)
    assert api.complete(prompt=[9, 9], max_tokens=5).is_success
    assert not api.complete(prompt=[9] * 999).is_success
    assert not api.complete(prompt="").is_success
    assert not api.complete(temperature=9).is_success
    after = samples(api)

    def grown(name: str, *labels: str) -> float:
        return after[name, labels] - before.get((name, labels), 0.0)

    assert grown("tandem_requests_total", "finished") == 1
    assert grown("tandem_requests_total", "context_length_exceeded") == 1
    assert grown("tandem_requests_total", "invalid_value") == 2
    assert grown("tandem_time_to_first_token_seconds_count") == 1
    assert 1 <= grown("tandem_inter_token_latency_seconds_count") <= 4
    assert grown("tandem_request_seconds_count") == 1
    assert after["tandem_worker_up", ("decode", "d1")] == 1
    assert after["tandem_worker_kv_blocks_used", ("d1",)] == 10
    assert after["tandem_worker_kv_blocks_free", ("d1",)] == 90
    assert after["tandem_worker_kv_blocks", ("p1",)] == 100
    assert after["tandem_handoff_bytes_total", ("d1",)] == 7
    assert after["tandem_preemptions_total", ("d1",)] == 6
    assert after["tandem_prompt_tokens_total", ("d1",)] == 2
    assert after["tandem_cached_tokens_total", ("d1",)] == 3
    assert after["tandem_output_tokens_total", ("d1",)] == 4


def test_metrics_of_the_offload_tier_at_the_workers(api: Api) -> None:
    api.workers["d1"].load = dict(OFFLOAD)
    api.wait(lambda: samples(api)["tandem_offload_failures_total", ("d1",)] == 39)
    page = samples(api)
    for value, source in ((31, "memory"), (32, "disk"), (33, "remote")):
        assert page["tandem_fetched_tokens_total", (source, "d1")] == value
    names = ("fetch_bytes", "fetch_seconds", "fetch_failures", "recomputed_tokens", "offloaded_blocks")
    assert [page[f"tandem_{name}_total", ("d1",)] for name in names] == [34, 35, 36, 37, 38]


def test_the_mirror_of_the_index_is_shown(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real Redis: what a store publishes arrives in /metrics, /status and /kv."""
    monkeypatch.setattr("kvstore.mirror.BLOCK_MS", 50)
    redis = EmbeddedRedis()
    one = Api(model_directory)
    one.settings = dataclasses.replace(one.settings, redis_url=redis.url)

    async def publish() -> None:
        writer = IndexWriter(redis.url, NAMESPACE, "a", 1, "a:1")
        await writer.claim()
        assert await writer.publish([Change(bytes([i]) * 32, 1, True) for i in range(5)])
        await writer.close()

    try:
        with one.serving("") as api:
            api.wait(lambda: api.http.get("/status").json()["index"]["snapshots_total"] == 1)
            api.run(publish())
            api.wait(lambda: api.http.get("/status").json()["index"]["blocks"] == 5)
            page = samples(api)
            names = ("blocks", "events_total", "gaps_total", "snapshots_total")
            assert [page[f"tandem_index_{name}", ()] for name in names] == [5, 1, 0, 1]
            assert 0 <= page["tandem_index_behind_seconds", ()] < 20
            assert api.http.get("/kv").json()["index"]["blocks"] == 5
    finally:
        redis.close()


def test_every_metric_is_documented(guarded: Api) -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    page = guarded.http.get("/metrics").text
    names = [family.name.removesuffix("_created") for family in text_string_to_metric_families(page)]
    assert [name for name in names if f"`{name}`" not in text and f"`{name}_total`" not in text] == []


def test_metrics_answer_head(api: Api) -> None:
    response = api.http.head("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert response.content == b""


def test_stores_are_shown(guarded: Api) -> None:
    page = samples(guarded)
    states = {state: page["tandem_store_slabs", (state, "store-1")] for state in ("free", "reserved", "held", "cached")}
    assert states == {"free": 4, "reserved": 1, "held": 2, "cached": 3}
    assert page["tandem_store_up", ("store-1",)] == 1
    names = (
        "pinned_blocks", "disk_blocks", "disk_bytes", "disk_limit_bytes", "disk_writes_total", "disk_reads_total",
        "disk_errors_total", "found_blocks_total", "missed_blocks_total", "fetched_blocks_total",
        "corrupt_blocks_total",
    )  # fmt: skip
    assert [page[f"tandem_store_{name}", ("store-1",)] for name in names] == list(range(11, 22))
    assert page["tandem_store_block_bytes", ("store-1",)] == 4096
    (store,) = guarded.http.get("/status").json()["stores"]
    assert (store["id"], store["answers"], store["slabs"]["cached"]) == ("store-1", True, 3)
    assert store["kv_tiers"] == {"memory": {"blocks": 5, "bytes": 5 * 4096}, "disk": {"blocks": 12, "bytes": 13}}


def test_keys_are_asked_for_under_v1_only(guarded: Api) -> None:
    for path in ("/health", "/ready", "/metrics", "/status", "/openapi.json"):
        assert guarded.http.get(path).is_success, path
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
    ):
        for path in ("/v1/models", "/v1/nowhere", "/v1"):
            response = guarded.http.get(path, headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers
    for key in ("first-key", "second-kéy"):
        assert guarded.http.get("/v1/models", headers={b"authorization": b"Bearer " + key.encode()}).is_success
    assert guarded.http.get("/v1/models", headers={"authorization": "bearer first-key"}).is_success


def test_tenants_do_not_share_a_cache(guarded: Api) -> None:
    for key in ("first-key", "second-kéy", "first-key"):
        headers = {b"authorization": b"Bearer " + key.encode()}
        assert guarded.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers).is_success
    asked = guarded.workers["b1"].generations[-3:]
    first, second, third = [generation.salt for generation in asked]
    assert first == third != second
    first_key = hashlib.sha256(b"first-key").hexdigest()
    assert asked[0].tenant == asked[2].tenant == tenant_tag(SECRET, first_key) != asked[1].tenant


def test_a_burst_over_the_limit_is_refused_before_any_worker_reports_it(guarded: Api) -> None:
    """Eight at once, of which three may wait: a worker with one slot is given that one and, once its report shows no
    more than that, another."""
    worker = guarded.workers["b1"]
    worker.hold_at = 0
    headers = {"authorization": "Bearer first-key"}

    def post(_: int) -> int:
        body = {"prompt": "x", "max_tokens": 2}
        return guarded.http.post("/v1/completions", json=body, headers=headers).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, number) for number in range(8)]
        guarded.wait(lambda: sum(answer.done() for answer in answers) >= 3 and len(worker.running) == 2)
        guarded.set(worker.go.set)
        codes = sorted(answer.result(timeout=10) for answer in answers)
    assert codes in ([200] * 5 + [429] * 3, [200] * 4 + [429] * 4)


def test_redis_down_is_shown_and_harmless(guarded: Api) -> None:
    guarded.membership.error = ConnectionError("down")
    guarded.wait(lambda: guarded.http.get("/status").json()["redis"] == "unreachable")
    headers = {"authorization": "Bearer first-key"}
    assert guarded.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=headers).is_success
    guarded.membership.error = None
    guarded.wait(lambda: guarded.http.get("/status").json()["redis"] == "reachable")


def test_no_worker_yet(model_directory: Path) -> None:
    with Api(model_directory).serving("") as api:
        assert api.http.get("/health").status_code == 200
        ready = api.http.get("/ready")
        assert ready.status_code == 503
        assert "retry-after" in ready.headers
        started = time.monotonic()
        response = api.chat()
        assert time.monotonic() - started < 5
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "service_unavailable"
        assert int(response.headers["retry-after"]) >= 1
