"""The normal path, and every way of leaving it early."""

import asyncio
from contextlib import aclosing

import pytest

from cluster.messages import DecodeJob, PrefillJob, Refused, Sampling
from router import chains
from router.request import Request
from tests.router.bench import PROMPT, Bench, run
from tests.router.fakes import EOS, MODEL_KEY, FakeWorker, StaticMembership, eventually, tokens_for


# ------------------------------------------------------------------------------------------------ when all goes well
def test_prefill_hands_over_to_decode() -> None:
    async def test(b: Bench) -> None:
        assert await b.serve() == tokens_for(PROMPT, 8)
        assert b.finish == "length"
        (prefill,) = b.workers["p1"].jobs
        (decode,) = b.workers["d1"].jobs
        assert isinstance(prefill, PrefillJob)
        assert isinstance(decode, DecodeJob)
        assert decode.handoff is not None
        assert decode.handoff.transfer_id == prefill.generation.id != decode.generation.id
        assert prefill.generation.output == decode.generation.output == ()
        assert prefill.generation.salt == b"salt"
        assert 0 < prefill.generation.deadline_ms <= 30_000
        await b.quiet()
        assert not b.workers["p1"].aborted
        assert not b.workers["d1"].aborted

    run("pd", test)


def test_one_worker_does_both() -> None:
    async def test(b: Bench) -> None:
        assert await b.serve() == tokens_for(PROMPT, 8)
        (job,) = b.workers["b1"].jobs
        assert isinstance(job, DecodeJob)
        assert job.handoff is None

    run("b", test)


def test_one_token_is_all_prefill() -> None:
    async def test(b: Bench) -> None:
        assert await b.serve(max_tokens=1) == tokens_for(PROMPT, 1)
        assert b.finish == "length"
        (job,) = b.workers["p1"].jobs
        assert isinstance(job, DecodeJob)
        assert job.handoff is None
        assert not b.workers["d1"].jobs

    run("pd", test)


def test_the_end_at_the_first_token_spares_the_decode_worker() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].eos_at = 0
        b.workers["d1"].hold_at = 1
        assert await b.serve() == [EOS]
        assert b.finish == "stop"
        await b.quiet()
        assert len(b.workers["d1"].aborted) == 1

    run("pd", test)


def test_the_first_token_does_not_wait_for_the_decode_worker() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].accept.clear()
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.tokens == tokens_for(PROMPT, 1))
        assert not b.workers["d1"].jobs
        b.workers["d1"].accept.set()
        assert await serving == tokens_for(PROMPT, 8)

    run("pd", test)


def test_tokens_that_come_before_the_first_one_wait_for_it() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].hold_at = 0
        b.workers["d1"].follow = False
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.workers["d1"].jobs and not b.workers["d1"].running)
        assert not b.deltas
        b.workers["p1"].go.set()
        assert await serving == tokens_for(PROMPT, 8)
        await b.quiet()
        assert not b.workers["p1"].aborted

    run("pd", test)


@pytest.mark.parametrize("per_frame", [1, 3, 100])
def test_frames_of_many_tokens(per_frame: int) -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].tokens_per_frame = per_frame
        assert await b.serve(max_tokens=40) == tokens_for(PROMPT, 40)

    run("pd", test)


def test_cached_tokens_are_those_of_who_looked_up_the_prompt() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].cached_tokens, b.workers["d1"].cached_tokens = 3, 4
        await b.serve()
        assert b.deltas[-1].cached_tokens == 3

    run("pd", test)


def test_many_at_once_are_spread_over_the_workers() -> None:
    async def test(b: Bench) -> None:
        requests = [Request(f"r{i}", (i, i + 1, i + 2), Sampling(max_tokens=20), b"", "") for i in range(24)]

        async def one(request: Request) -> list[int]:
            return [token async for delta in b.dispatcher.serve(request) for token in delta.tokens]

        answers = await asyncio.gather(*map(one, requests))
        assert answers == [tokens_for(request.prompt, 20) for request in requests]
        assert all(4 <= len(worker.jobs) <= 20 for worker in b.workers.values())
        await b.quiet()

    run("ppdd", test)


def test_a_prompt_goes_to_whoever_has_its_prefix() -> None:
    async def test(b: Bench) -> None:
        prompt = tuple(range(100))
        known = await chains.hashes(MODEL_KEY, prompt, b"salt", True)
        for worker_id, blocks in (("b1", 1), ("b2", 6), ("b3", 0)):
            owner = b.fleet.link(worker_id).view().owner
            b.fleet._map.put(owner, known[:blocks])
        for salt, expected in ((b"salt", "b2"), (b"salt", "b2"), (b"other", None)):
            request = Request("r", prompt, Sampling(max_tokens=2), salt, "")
            answer = [token async for delta in b.dispatcher.serve(request) for token in delta.tokens]
            assert answer == tokens_for(prompt, 2)
            (decision,) = request.decisions
            assert decision.chosen.device_tokens == (96 if expected else 0)
            assert expected is None or decision.route.decode == expected

    run("bbb", test)


def test_every_decision_is_kept() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].refuse = b.workers["p2"].refuse = Refused("server_overloaded", "full")
        request = Request("r", PROMPT, Sampling(max_tokens=4), b"", "")
        assert [token async for delta in b.dispatcher.serve(request) for token in delta.tokens] == tokens_for(PROMPT, 4)
        prefills = [decision.route.prefill for decision in request.decisions]
        assert set(prefills[:2]) == {"p1", "p2"}
        assert prefills[2:] == [None]

    run("ppd", test)


def test_the_decode_worker_is_reserved_while_the_prefill_worker_thinks() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].accept.clear()
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.fleet.link("p1").pending)
        assert b.fleet.link("d1").view().sent_context == len(PROMPT)
        assert b.fleet.link("d1").view().sent_tokens == 0
        serving.cancel()
        await asyncio.wait({serving})
        assert not b.fleet.link("d1").pending
        b.workers["p1"].accept.set()
        await b.quiet()

    run("pd", test)


def test_a_decode_worker_that_leaves_while_the_prefill_worker_thinks_is_replaced() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].accept.clear()
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.fleet.link("p1").pending)
        first, second = ("d1", "d2") if b.fleet.link("d1").pending else ("d2", "d1")
        await b.workers[first].die()
        await eventually(lambda: first not in b.fleet.table.ids())
        b.workers["p1"].accept.set()
        assert await serving == tokens_for(PROMPT, 8)
        assert len(b.workers["p1"].jobs) == len(b.workers[second].jobs) == 1

    run("pdd", test)


# ----------------------------------------------------------------------------------------------------------- leaving
@pytest.mark.parametrize("prefill_at", [0, None])
def test_cancelling_aborts_both_legs(prefill_at: int | None) -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].hold_at, b.workers["d1"].hold_at = prefill_at, 3
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.workers["d1"].jobs and len(b.tokens) == (3 if prefill_at is None else 0))
        serving.cancel()
        await asyncio.wait({serving})
        assert serving.cancelled()
        await b.quiet()
        assert len(b.workers["p1"].aborted) == len(b.workers["d1"].aborted) == 1

    run("pd", test)


def test_cancelling_while_a_worker_thinks_about_the_job_aborts_it_once_accepted() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].accept.clear()
        b.workers["p1"].hold_at = 0
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: any(link.pending for link in b.fleet.links()))
        serving.cancel()
        await asyncio.wait({serving})
        b.workers["p1"].accept.set()
        await eventually(lambda: b.workers["p1"].aborted)
        await b.quiet()
        assert b.workers["p1"].jobs

    run("pd", test)


def test_closing_the_iterator_early_aborts() -> None:
    async def test(b: Bench) -> None:
        request = Request("r", PROMPT, Sampling(max_tokens=100), b"", "")
        b.workers["d1"].hold_at = 5
        async with aclosing(b.dispatcher.serve(request)) as deltas:
            await anext(deltas)
        await b.quiet()
        assert len(b.workers["d1"].aborted) == 1

    run("pd", test)


def test_a_worker_replaced_under_the_same_name_fails_its_requests_over() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].hold_at = 2
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: len(b.tokens) == 2)
        twin = await FakeWorker("d1", "decode", {}).start()
        membership = b.fleet._membership
        assert isinstance(membership, StaticMembership)
        membership.workers = [twin.info, b.workers["d2"].info]
        assert await serving == tokens_for(PROMPT, 8)
        assert b.workers["d2"].jobs
        await eventually(lambda: not b.workers["d1"].running)
        await twin.die()

    run("dd", test)
