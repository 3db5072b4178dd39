"""Workers and the offload tier: what one has computed another uses, and nothing that goes wrong changes a token."""

import asyncio
from typing import Any

import pytest

from cluster.messages import Abort, Accepted, DecodeJob, Submit
from kvstore.redis_server import EmbeddedRedis
from tests.workers.site import (
    BUSY,
    CONFIG,
    FULL,
    LAYOUT,
    PROMPT,
    Site,
    expected,
    generation,
    prefill,
    run,
    store_process,
    until,
)


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple((seed * 131 + i * 7) % 1000 for i in range(length))


async def prefilled(site: Site, worker: str, name: str, **more: Any) -> None:
    """A prefill whose blocks are all in the store."""
    await prefill(site.clients[worker], name, **more)
    await until(lambda: name in site.tokens)

    async def sealed() -> bool:
        return (await site.stat()).reserved == 0

    if site.address:
        await until(sealed)


# --------------------------------------------------------------------------------------------------------- reuse
def test_a_prompt_outlives_the_worker_that_prefilled_it(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("a")
        await site.worker("b")
        await prefilled(site, "a", "p1")
        await site.stop("a")
        await site.connected("b")
        before = site.load("b").prompt_tokens_total
        assert await site.complete("b", "d1") == expected(PROMPT, 10)
        assert site.cached["d1"] == FULL
        load = site.load("b")
        assert load.prompt_tokens_total - before == len(PROMPT) - FULL
        assert load.fetched_memory_tokens_total == FULL
        assert load.fetched_bytes_total == FULL * LAYOUT.token_bytes
        assert load.fetch_failures_total == 0
        await until(lambda: site.idle(site.load("b")))

    run(body, redis)


def test_the_next_turn_of_a_conversation_hits_what_decode_produced_on_another_worker(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("a")
        await site.worker("b")
        await site.connected("a", "b")
        answer = await site.complete("a", "turn1", new=30)
        blocks = (len(PROMPT) + 29) // CONFIG.block_size
        await until(lambda: site.load("a").offloaded_blocks_total == blocks)
        conversation = (*PROMPT, *answer, 1, 2, 3)
        assert await site.complete("b", "turn2", prompt=conversation) == expected(conversation, 10)
        assert site.cached["turn2"] == blocks * CONFIG.block_size
        await site.quiet()

    run(body, redis)


def test_a_prompt_is_written_when_it_is_seen_for_the_second_time(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("a")
        await site.worker("b")
        await site.connected("a", "b")
        await site.complete("a", "once", new=1)
        assert site.load("a").offloaded_blocks_total == 0
        await site.complete("a", "twice", new=1)
        await until(lambda: site.load("a").offloaded_blocks_total == FULL // CONFIG.block_size)
        assert await site.complete("b", "other", new=5) == expected(PROMPT, 5)
        assert site.cached["other"] == FULL
        await site.quiet()

    run(body, redis)


def test_what_would_be_evicted_is_written_first(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("a", blocks=128)
        await site.worker("b")
        await site.connected("a", "b")
        for seed in range(20):  # 200 blocks
            await site.complete("a", f"s{seed}", prompt=prompt(40, seed), new=1)
            await until(lambda: site.idle(site.load("a")))
        assert site.load("a").offload_failures_total == 0
        assert await site.complete("b", "again", prompt=prompt(40, 0), new=5) == expected(prompt(40, 0), 5)
        assert site.cached["again"] == 36
        await site.quiet()

    run(body, redis)


def test_preempted_sequences_resume_with_what_the_store_has(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("a", blocks=40, step_s=0.005, token_s=0.0002, config=BUSY)
        await site.connected("a")
        prompts = {f"s{i}": prompt(20 + i, i) for i in range(8)}
        tasks = [site.complete("a", name, prompt=tokens, new=40) for name, tokens in prompts.items()]
        assert await asyncio.gather(*tasks) == [expected(tokens, 40) for tokens in prompts.values()]
        assert site.load("a").preemptions_total > 0
        assert site.load("a").fetched_memory_tokens_total > 0
        await site.quiet()

    run(body, redis)


def test_a_prefill_job_fetches_what_another_node_s_store_would_have(redis: EmbeddedRedis) -> None:
    """Its handoff is whole all the same, and its reader gets the right tokens."""

    async def body(site: Site) -> None:
        await site.worker("a")
        await site.worker("b")
        await prefilled(site, "a", "p1")
        await site.connected("b")
        before = site.load("b").prompt_tokens_total
        longer = (*PROMPT, *range(100, 120))
        handoff = (await prefill(site.clients["b"], "p2", prompt=longer)).handoff
        job = DecodeJob(generation("d2", longer), handoff)
        assert isinstance(await site.clients["a"].call("Submit", Submit("router", job), 5), Accepted)
        await until(lambda: "d2" in site.finished)
        assert site.tokens["d2"] == expected(longer, 10)
        assert site.load("b").prompt_tokens_total - before == len(longer) - FULL
        await site.quiet()

    run(body, redis)


def test_several_stores_of_a_node_are_all_read(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        async with store_process(redis.url, "p1"), store_process(redis.url, "p2"):
            names = [f"w{i}" for i in range(4)]  # their preferences differ
            for name in names:
                await site.worker(name)
            await site.connected(*names)
            for index, name in enumerate(names):
                tokens = prompt(41, 100 + index)
                await prefilled(site, name, f"p-{name}", prompt=tokens)
            for index in range(len(names)):
                tokens = prompt(41, 100 + index)
                reader = names[(index + 1) % len(names)]

                async def hit(reader: str = reader, tokens: tuple[int, ...] = tokens, index: int = index) -> bool:
                    name = f"d{index}-{len(site.finished)}"  # the index may not know yet: once more
                    assert await site.complete(reader, name, prompt=tokens) == expected(tokens, 10)
                    return site.cached[name] == 40

                await until(hit)

    run(body, redis, store=False)


# ------------------------------------------------------------------------------------------------------ isolation
def test_another_salt_hits_nothing_and_a_miss_is_the_same_work_whoever_has_the_content(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("a")
        await site.worker("b")
        await site.connected("a", "b")
        await prefilled(site, "a", "p1", salt=b"alice")
        found, work = [], []
        for name, tokens in (("known to alice", PROMPT), ("known to nobody", prompt(len(PROMPT), 3))):
            before, stat = site.load("b"), await site.stat()
            assert await site.complete("b", name, prompt=tokens, salt=b"bob", new=1) == expected(tokens, 1)
            after, now = site.load("b"), await site.stat()
            assert site.cached[name] == 0
            found.append(
                (now.found_blocks_total - stat.found_blocks_total, now.missed_blocks_total - stat.missed_blocks_total)
            )
            work.append(
                (
                    after.prompt_tokens_total - before.prompt_tokens_total,
                    after.fetched_bytes_total - before.fetched_bytes_total,
                    after.recomputed_tokens_total - before.recomputed_tokens_total,
                )
            )
        assert work[0] == work[1] == (len(PROMPT), 0, 0)
        assert found[0] == found[1]
        assert found[0][0] == 0
        await site.quiet()

    run(body, redis)


# ---------------------------------------------------------------------------------------------------------- aborts
@pytest.mark.parametrize("delay_ms", [0, 2, 5, 10, 20, 40])
def test_an_abort_at_any_stage_leaves_no_block_no_slab_and_no_pin(redis: EmbeddedRedis, delay_ms: int) -> None:
    """Prefills, fetches and decodes with offloads of the same prompts, aborted a while after they were accepted."""

    async def body(site: Site) -> None:
        await site.worker("a", config=BUSY)
        await site.worker("b", config=BUSY)
        await site.connected("a", "b")
        for seed in range(4):
            await prefilled(site, "a", f"p{seed}", prompt=prompt(200, seed))
        names = []
        for seed in range(6):  # two that have to be computed
            tokens = prompt(200, seed)
            names += [f"d{seed}", f"q{seed}"]
            await site.clients["b"].call("Submit", Submit("router", DecodeJob(generation(f"d{seed}", tokens, 200))), 5)
            await prefill(site.clients["b"], f"q{seed}", prompt=tokens)
        await asyncio.sleep(delay_ms / 1000)
        await site.clients["b"].call("Abort", Abort(tuple(names)), 5)
        await site.quiet()
        # what is there is whole
        assert await site.complete("b", "after", prompt=prompt(200, 0)) == expected(prompt(200, 0), 10)
        await site.quiet()

    run(body, redis)
