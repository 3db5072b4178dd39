"""Workers as routers and stores see them: real gRPC, a real store and a real Redis; only the model is simulated."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest

from cluster.membership import Membership
from cluster.messages import Abort, Accepted, Ack, DecodeJob, Drain, Migrate, PrefillJob, Refused, SetRole, Submit
from kvstore.redis_server import EmbeddedRedis
from tests.workers.site import (
    CONFIG,
    CONTEXT,
    KEY,
    PROMPT,
    VOCAB,
    Site,
    expected,
    generation,
    none,
    prefill,
    run,
    runner,
    until,
)
from workers import registration as registration_module
from workers.sim import Timings, sim_layout
from workers.worker import Worker, WorkerSettings


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


def test_blocks_go_from_one_worker_to_another_and_nothing_is_kept(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        p, d = await site.worker("p"), await site.worker("d")
        handoff = (await prefill(p, "p1")).handoff
        assert handoff is not None
        assert isinstance(await d.call("Submit", Submit("router", DecodeJob(generation("d1"), handoff)), 5), Accepted)
        await until(lambda: len(site.tokens.get("d1", [])) == 10)
        assert site.tokens["d1"] == expected(PROMPT, 10)
        assert site.tokens["p1"] == site.tokens["d1"][:1]
        await until(lambda: site.load("d").handoff_bytes_total == len(PROMPT) * sim_layout(4).token_bytes)
        assert site.load("d").prompt_tokens_total == 0
        await until(lambda: all(site.load(name).blocks_free == site.load(name).blocks_total for name in ("p", "d")))
        await until(lambda: none(site.held()))

    run(body, redis)


def test_a_broken_output_stream_aborts_the_jobs_behind_it(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w", step_s=0.005)
        await client.call("Submit", Submit("router", DecodeJob(generation("d1", new=400))), 5)
        await prefill(client, "p1")
        await until(lambda: bool(site.tokens.get("d1")))
        await site.leave()
        site.readers = [asyncio.create_task(site.read("w"))]
        await until(lambda: site.load("w").running == site.load("w").waiting == 0)
        await until(lambda: site.load("w").blocks_free == site.load("w").blocks_total)
        assert len(site.tokens["d1"]) < 400

    run(body, redis)


def test_an_aborted_handoff_is_given_back_wherever_it_is(redis: EmbeddedRedis) -> None:
    """Finished and unclaimed at the prefill worker; waiting for room at the decode worker."""

    async def body(site: Site) -> None:
        p, d = await site.worker("p"), await site.worker("d", step_s=0.005)
        await prefill(p, "p1")
        await until(lambda: "p1" in site.tokens)
        await p.call("Abort", Abort(("p1",)), 5)
        await until(lambda: none(site.held()))
        for name in ("busy1", "busy2"):  # max_sequences
            await d.call("Submit", Submit("router", DecodeJob(generation(name, new=400))), 5)
        handoff = (await prefill(p, "p2", prompt=tuple(range(100, 150)))).handoff
        waiting = DecodeJob(generation("d2", prompt=tuple(range(100, 150))), handoff)
        await d.call("Submit", Submit("router", waiting), 5)
        await until(lambda: site.load("d").waiting == 1)
        assert await site.held() > 0
        await d.call("Abort", Abort(("d2", "busy1", "busy2")), 5)
        await until(lambda: none(site.held()))

    run(body, redis)


def test_a_full_queue_and_jobs_that_make_no_sense_are_refused(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w", step_s=0.01)

        async def refusal(prompt: tuple[int, ...], router: str = "router") -> str:
            answer = await client.call("Submit", Submit(router, DecodeJob(generation("x", prompt, 400))), 5)
            return answer.code if isinstance(answer, Refused) else ""

        assert await refusal(PROMPT, router="stranger") == "service_unavailable"
        assert await refusal(()) == "invalid_value"
        assert await refusal(tuple(range(CONTEXT))) == "invalid_value"
        assert await refusal((1, VOCAB)) == "invalid_value"
        for number in range(CONFIG.max_sequences + CONFIG.max_queue):
            job = DecodeJob(generation(f"d{number}", (number + 1,), 400))
            assert isinstance(await client.call("Submit", Submit("router", job), 5), Accepted)
        await until(lambda: site.load("w").waiting == CONFIG.max_queue)
        await until(lambda: _equal(refusal(PROMPT), "server_overloaded"))

    run(body, redis)


async def _equal(answer: Awaitable[str], wanted: str) -> bool:
    return await answer == wanted


def test_a_role_change_is_a_message(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w")
        assert site.load("w").role == "both"
        assert await client.call("SetRole", SetRole("prefill"), 5) == Ack()
        await until(lambda: site.load("w").role == "prefill")

    run(body, redis)


def test_the_role_is_registered_anew(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w")
        await client.call("SetRole", SetRole("prefill"), 5)
        await until(lambda: registered(redis.url, [("w", "prefill")]))

    run(body, redis)


def test_a_worker_says_how_long_it_took_to_start_and_how_large_its_blocks_are(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        settings = WorkerSettings("w", "both", KEY, CONTEXT, site.identity, CONFIG)
        worker = Worker(runner(Timings()), settings, began=time.monotonic() - 100)
        await site.serve("w", worker)
        await until(lambda: registered(redis.url, [("w", "both")]))
        membership = Membership(redis.url)
        (info,), _ = await membership.members("ns")
        await membership.close()
        assert 100 < info.started_s < 160
        assert info.block_bytes == sim_layout(CONFIG.block_size).block_bytes

    run(body, redis)


async def registered(url: str, wanted: list[tuple[str, str]]) -> bool:
    """Whether these (worker, role) are registered, and no others."""
    membership = Membership(url)
    try:
        workers, _ = await membership.members("ns")
    finally:
        await membership.close()
    return [(worker.id, worker.role) for worker in workers] == wanted


# ------------------------------------------------------------------------------------------------------------- leaving
def test_a_worker_that_drains_finishes_what_it_has_and_takes_nothing_new(
    redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "REGISTER_S", 0.02)

    async def body(site: Site) -> None:
        client = await site.worker("w", step_s=0.005)
        await site.connected("w")
        await until(lambda: registered(redis.url, [("w", "both")]))
        running = asyncio.create_task(site.complete("w", "d1", new=100))
        await until(lambda: bool(site.tokens.get("d1")))
        assert await client.call("Drain", Drain(), 5) == Ack()
        for job in (DecodeJob(generation("d2")), PrefillJob(generation("p2"))):
            answer = await client.call("Submit", Submit("router", job), 5)
            assert isinstance(answer, Refused)
            assert answer.code == "leaving"
        await until(lambda: registered(redis.url, []))
        assert await running == expected(PROMPT, 100)
        assert await registered(redis.url, []), "it does not come back"

    run(body, redis)


def test_draining_does_not_need_redis(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What could not be removed is removed when Redis is back."""
    monkeypatch.setattr(registration_module, "REGISTER_S", 0.05)
    monkeypatch.setattr("cluster.membership.TIMEOUT_S", 0.3)
    caplog.set_level("INFO", registration_module.__name__)
    server = EmbeddedRedis()

    async def body(site: Site) -> None:
        client = await site.worker("w")
        await until(lambda: registered(server.url, [("w", "both")]))
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert await client.call("Drain", Drain(), 5) == Ack()
            answer = await client.call("Submit", Submit("router", DecodeJob(generation("d"))), 5)
            assert isinstance(answer, Refused)
            await until(lambda: "will expire by itself" in caplog.text)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await until(lambda: registered(server.url, []))

    try:
        run(body, server, store=False)
    finally:
        server.close()


def test_what_a_worker_gives_up_goes_on_elsewhere_with_the_same_tokens(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        a, b = await site.worker("a", step_s=0.01), await site.worker("b")
        await site.connected("a", "b")
        for name in ("d1", "d2"):  # max_sequences
            await a.call("Submit", Submit("router", DecodeJob(generation(name, new=150))), 5)
        await until(lambda: all(len(site.tokens.get(name, [])) > 2 for name in ("d1", "d2")))
        waiting = asyncio.create_task(site.complete("a", "waits", prompt=(9, 8, 7), new=3))
        await until(lambda: site.load("a").waiting == 1)
        assert await a.call("Migrate", Migrate(), 5) == Ack()
        await until(lambda: {"d1", "d2"} <= site.failed.keys())
        assert (site.failed["d1"], site.failed["d2"]) == ("moved", "moved")
        assert await waiting == expected((9, 8, 7), 3), "what has not begun is not given up"
        so_far = site.tokens["d1"]
        assert 2 < len(so_far) < 150
        site.tokens["d1 again"] = list(so_far)
        job = DecodeJob(replace(generation("d1 again", new=150), output=tuple(so_far)))
        assert isinstance(await b.call("Submit", Submit("router", job), 5), Accepted)
        await until(lambda: "d1 again" in site.finished)
        assert site.tokens["d1 again"] == expected(PROMPT, 150)
        assert site.cached["d1 again"] >= len(PROMPT) // CONFIG.block_size * CONFIG.block_size
        await site.quiet()

    run(body, redis)


def test_a_prefill_is_not_given_up(redis: EmbeddedRedis) -> None:
    """It ends by itself soon, and somebody follows it."""

    async def body(site: Site) -> None:
        client = await site.worker("w", step_s=0.02)
        prompt = tuple(range(1, 200))
        await prefill(client, "p", prompt=prompt)
        await until(lambda: site.load("w").running == 1)
        await client.call("Migrate", Migrate(), 5)
        await until(lambda: "p" in site.tokens)
        assert site.tokens["p"] == expected(prompt, 1)
        assert not site.failed

    run(body, redis)
