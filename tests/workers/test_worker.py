"""Workers as routers and stores see them: real gRPC, a real store and a real Redis; only the model is simulated."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from cluster.messages import Abort, Accepted, Ack, DecodeJob, Refused, SetRole, Submit
from kvstore.redis_server import EmbeddedRedis
from tests.workers.site import CONFIG, CONTEXT, PROMPT, VOCAB, Site, expected, generation, none, prefill, run, until
from workers.sim import sim_layout


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
