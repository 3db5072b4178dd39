"""A worker's spans where no handoff is in the way: what it fetched, computed and generated, and how often it began."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import telemetry
from cluster.messages import Abort, DecodeJob, PrefillJob, Refused, Submit
from kvstore.redis_server import EmbeddedRedis
from tests.collector import Collector, Seen, edges, exporting
from tests.workers.site import CONFIG, FULL, Site, generation, prefill, run, until


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with exporting(monkeypatch) as made:
        yield made


def tree(collector: Collector) -> dict[str, Seen]:
    """By name; every name once."""
    telemetry.close()
    (trace,) = collector.traces()
    spans = {span.name: span for span in collector.tree(trace)}
    assert len(spans) == len(collector.tree(trace))
    return spans


def test_what_a_store_has_is_fetched_and_the_rest_computed(redis: EmbeddedRedis, collector: Collector) -> None:
    async def body(site: Site) -> None:
        await site.worker("a")
        await site.worker("b")
        await prefill(site.clients["a"], "p1")
        await until(lambda: "p1" in site.tokens)
        await site.connected("b")
        leg = telemetry.root("leg", {}, {})
        with telemetry.current(leg):
            await site.complete("b", "d1")
        telemetry.end(leg)
        await site.quiet()

    run(body, redis)
    spans = tree(collector)
    assert edges([*spans.values()]) == sorted(
        [("leg", ""), ("decode", "leg"), ("store find", "decode"), ("queue", "decode"), ("fetch", "decode"),
         ("store fetch", "fetch"), ("compute", "decode"), ("generate", "decode")]
    )  # fmt: skip
    assert spans["fetch"].attributes["tandem.fetched_blocks"] == FULL // CONFIG.block_size
    assert spans["fetch"].attributes["tandem.sources"][0].startswith("memory ")
    assert spans["compute"].attributes["tandem.cached_tokens"] == FULL
    assert spans["decode"].attributes["tandem.worker"] == "b"
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 10
    assert spans["fetch"].ended_ns <= spans["compute"].ended_ns <= spans["generate"].ended_ns


def test_preemptions_are_counted_and_an_abort_ends_the_span(redis: EmbeddedRedis, collector: Collector) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("a", blocks=40)  # 160 tokens
        leg = telemetry.root("leg", {}, {})
        older = asyncio.create_task(site.complete("a", "older", new=80))
        await until(lambda: "older" in site.tokens)
        with telemetry.current(leg):
            job = DecodeJob(generation("younger", prompt=tuple(range(200, 250)), new=90))
            await client.call("Submit", Submit("router", job), 5)
        await older
        assert site.load("a").preemptions_total > 0
        await until(lambda: "younger" in site.tokens)
        await client.call("Abort", Abort(("younger",)), 5)
        await site.quiet()
        telemetry.end(leg)

    run(body, redis)
    telemetry.close()
    (trace,) = collector.traces()
    (decode,) = [span for span in collector.tree(trace) if span.name == "decode"]
    assert decode.attributes["tandem.preemptions"] > 0
    assert ("queue", "decode") in edges(collector.tree(trace))


def test_a_job_that_is_refused_leaves_its_reason(redis: EmbeddedRedis, collector: Collector) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("a")
        leg = telemetry.root("leg", {}, {})
        with telemetry.current(leg):
            answer = await client.call("Submit", Submit("router", PrefillJob(generation("p"))), 5)
        telemetry.end(leg)
        assert isinstance(answer, Refused)

    run(body, redis, store=False)
    spans = tree(collector)
    assert edges([*spans.values()]) == [("leg", ""), ("prefill", "leg")]
    assert (spans["prefill"].failed, spans["prefill"].attributes["error.type"]) == (True, "store_error")
