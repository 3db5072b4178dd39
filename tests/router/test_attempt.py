"""What goes wrong within and between attempts: the client gets every token once, or a typed error."""

import asyncio

import pytest

from cluster.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Leaving,
    Moved,
    Overloaded,
    TandemError,
    Unavailable,
    WorkerLost,
)
from cluster.messages import DecodeJob, Refused
from router.dispatch import ATTEMPTS, MOVES
from tests.router.bench import PROMPT, Bench, run
from tests.router.fakes import eventually, tokens_for


# ------------------------------------------------------------------------------------------- when prefill goes wrong
def test_a_prefill_worker_that_refuses_is_replaced() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].refuse = Refused("store_no_space", "the arena is full")
        assert await b.serve() == tokens_for(PROMPT, 8)
        assert len(b.workers["p2"].jobs) == 1
        (decode,) = b.workers["d1"].jobs
        assert isinstance(decode, DecodeJob)
        assert decode.handoff is not None

    run("ppd", test)


def test_when_all_prefill_workers_refuse_decode_does_it() -> None:
    async def test(b: Bench) -> None:
        for worker_id in ("p1", "p2", "p3"):
            b.workers[worker_id].refuse = Refused("server_overloaded", "full")
        assert await b.serve() == tokens_for(PROMPT, 8)
        (decode,) = b.workers["d1"].jobs
        assert isinstance(decode, DecodeJob)
        assert decode.handoff is None

    run("pppd", test)


def test_a_prefill_worker_that_dies_before_it_accepts_is_replaced() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].accept.clear()
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: any(link.pending for link in b.fleet.links()))
        await b.workers["p1"].die()
        assert await serving == tokens_for(PROMPT, 8)
        assert len(b.workers["p2"].jobs) == 1
        await b.quiet()

    run("ppd", test)


def test_a_prefill_worker_that_dies_after_it_accepted_needs_no_replacement() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].hold_at = 0
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.workers["d1"].jobs)
        await b.workers["p1"].die()
        assert await serving == tokens_for(PROMPT, 8)
        assert len(b.workers["d1"].jobs) == 1
        assert not b.workers["p2"].jobs

    run("ppd", test)


def test_a_prefill_job_that_fails_after_it_was_accepted_needs_no_replacement() -> None:
    async def test(b: Bench) -> None:
        b.workers["p1"].fail = ("store_error", "the store died")
        assert await b.serve() == tokens_for(PROMPT, 8)
        assert len(b.workers["d1"].jobs) == 1

    run("pd", test)


def test_a_first_token_lost_with_its_worker_is_computed_again() -> None:
    """The blocks arrived, the token did not: nobody else would ever send it."""

    async def test(b: Bench) -> None:
        b.workers["p1"].hold_at = 0
        b.workers["d1"].follow = False
        b.workers["d1"].hold_at = 3
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: b.workers["d1"].jobs)
        await b.workers["p1"].die()
        b.workers["d1"].go.set()
        assert await serving == tokens_for(PROMPT, 8)
        await b.quiet()

    run("pd", test)


@pytest.mark.parametrize("per_frame", [1, 3])
@pytest.mark.parametrize("follow", [True, False])
def test_tokens_that_both_legs_send_are_delivered_once(per_frame: int, follow: bool) -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].repeat, b.workers["d1"].tokens_per_frame, b.workers["d1"].follow = True, per_frame, follow
        assert await b.serve() == tokens_for(PROMPT, 8)
        await b.quiet()

    run("pd", test)


# -------------------------------------------------------------------------------------------- when decode goes wrong
@pytest.mark.parametrize("roles", ["pdd", "bb", "dd"])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_decode_worker_lost_mid_stream(roles: str, at: int) -> None:
    async def test(b: Bench) -> None:
        for worker in b.workers.values():
            worker.hold_at = at if worker.role != "prefill" else None
        serving = asyncio.create_task(b.serve())
        # the first token may come from the prefill worker before the decode worker has its job
        decoding = [worker for worker in b.workers.values() if worker.role != "prefill"]
        await eventually(lambda: len(b.tokens) == at and any(worker.running for worker in decoding))
        (victim,) = [worker for worker in decoding if worker.running]
        others = [worker for worker in b.workers.values() if worker is not victim]
        for other in others:
            other.hold_at = None
        await victim.die()
        assert await serving == tokens_for(PROMPT, 8)
        assert b.finish == "length"
        again = [generation for other in others for generation in other.generations if generation.output]
        assert again
        assert all(generation.output == tuple(tokens_for(PROMPT, at)) for generation in again)
        assert not {generation.id for generation in again} & {generation.id for generation in victim.generations}
        await b.quiet()

    run(roles, test)


def test_a_silent_worker_is_a_lost_one() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].hold_at = 2
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: len(b.tokens) == 2)
        b.workers["d1"].silent = True
        assert await serving == tokens_for(PROMPT, 8)
        assert b.workers["d2"].jobs

    run("dd", test, worker_timeout_s=0.3)


def test_a_decode_worker_that_refuses_is_replaced() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].refuse = Refused("server_overloaded", "full")
        assert await b.serve() == tokens_for(PROMPT, 8)
        await b.quiet()

    run("pdd", test)


def test_a_decode_job_that_fails_is_placed_again() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].fail = ("store_corrupt", "checksum")
        assert await b.serve() == tokens_for(PROMPT, 8)
        assert b.workers["d2"].jobs

    run("pdd", test)


def test_a_request_that_is_moved_goes_on_elsewhere_and_nobody_has_failed() -> None:
    """As often as it takes: more often than attempts may fail."""

    async def test(b: Bench) -> None:
        moves, one, two = ATTEMPTS + 1, b.workers["d1"], b.workers["d2"]
        for worker in (one, two):
            worker.hold_at, worker.fail_held = 2, ("moved", "it drains")
        serving = asyncio.create_task(b.serve())
        for at in range(2, 2 + moves):
            await eventually(lambda: one.running or two.running)
            holding = one if one.running else two
            await eventually(lambda at=at: len(b.tokens) == at)
            for worker in (one, two):
                worker.hold_at = at + 1
            holding.go.set()
            await eventually(lambda worker=holding: not worker.running)
            holding.go = asyncio.Event()
        one.hold_at = two.hold_at = None
        for worker in (one, two):
            worker.go.set()
            worker.fail_held = None
        assert await serving == tokens_for(PROMPT, 8)
        await b.quiet()

    run("dd", test)


def test_the_only_worker_may_have_it_again_after_a_move() -> None:
    async def test(b: Bench) -> None:
        worker = b.workers["d1"]
        worker.hold_at, worker.fail_held = 3, ("moved", "its role changes")
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: len(b.tokens) == 3)
        worker.hold_at = None
        worker.go.set()
        assert await serving == tokens_for(PROMPT, 8)
        assert [len(generation.output) for generation in worker.generations] == [0, 3]

    run("d", test)


def test_moves_are_bounded() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].fail = ("moved", "not me")
        with pytest.raises(Moved):
            await b.serve()
        assert len(b.workers["d1"].jobs) == MOVES

    run("d", test)


@pytest.mark.parametrize("roles", ["pd", "d", "b"])
def test_who_takes_the_place_of_workers_that_leave_is_waited_for(roles: str) -> None:
    """A rolling restart: the new worker is up before the old ones go, and the router hears of it last."""

    async def test(b: Bench) -> None:
        for worker in b.workers.values():
            worker.refuse = Refused("leaving", "about to leave")
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: all(worker.refused for worker in b.workers.values()))
        assert not serving.done()
        new = await b.join("d9", "decode")
        assert await serving == tokens_for(PROMPT, 8)
        assert isinstance(new.jobs[-1], DecodeJob)
        await b.quiet()

    run(roles, test)


def test_it_is_not_waited_for_longer_than_it_takes_to_hear_of_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.dispatch.OTHERS_S", 0.5)

    async def test(b: Bench) -> None:
        b.workers["d1"].refuse = Refused("leaving", "about to leave")
        with pytest.raises(Leaving):
            await b.serve()
        assert b.workers["d1"].refused == 1

    run("d", test)


def test_the_prefill_worker_is_the_last_resort() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].hold_at = 5
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: len(b.tokens) == 5)
        await b.workers["d1"].die()
        assert await serving == tokens_for(PROMPT, 8)
        assert isinstance(b.workers["p1"].jobs[-1], DecodeJob)

    run("pd", test)


# ------------------------------------------------------------------------------------------------------ typed errors
def test_nobody_there() -> None:
    async def test(b: Bench) -> None:
        with pytest.raises(Unavailable):
            await b.serve()

    run("", test)


def test_everybody_refuses() -> None:
    async def test(b: Bench) -> None:
        for worker in b.workers.values():
            worker.refuse = Refused("server_overloaded", "queue is full", retry_after_ms=7_000)
        with pytest.raises(Overloaded, match="queue is full") as error:
            await b.serve()
        assert error.value.retry_after_s == 7.0
        await b.quiet()

    run("ppdd", test)


def test_attempts_are_bounded() -> None:
    async def test(b: Bench) -> None:
        for worker in b.workers.values():
            worker.fail = ("store_error", "no")
        with pytest.raises(TandemError) as error:
            await b.serve()
        assert error.value.code == "store_error"
        assert sum(len(worker.jobs) for worker in b.workers.values()) == ATTEMPTS

    run("dddddd", test)


@pytest.mark.parametrize("roles", ["d", "dd", "pdd"])
def test_an_error_that_would_come_again_is_not_retried(roles: str) -> None:
    async def test(b: Bench) -> None:
        for worker in b.workers.values():
            worker.fail = ("invalid_value", "no such token")
        with pytest.raises(InvalidRequest, match="no such token"):
            await b.serve()
        assert sum(len(worker.jobs) for worker in b.workers.values() if worker.role == "decode") <= 1
        await b.quiet()

    run(roles, test)


def test_an_unknown_error_code_is_a_bug_not_a_retry() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].fail = ("never heard of", "strange")
        with pytest.raises(TandemError) as error:
            await b.serve()
        assert error.value.status == 500

    run("d", test)


def test_the_only_worker_dies() -> None:
    async def test(b: Bench) -> None:
        b.workers["d1"].hold_at = 3
        serving = asyncio.create_task(b.serve())
        await eventually(lambda: len(b.tokens) == 3)
        await b.workers["d1"].die()
        with pytest.raises(WorkerLost, match="worker d1 was lost"):
            await serving
        assert b.tokens == tokens_for(PROMPT, 3)

    run("d", test)


@pytest.mark.parametrize("roles", ["d", "pd"])
def test_the_deadline_ends_a_request_that_hangs(roles: str) -> None:
    async def test(b: Bench) -> None:
        for worker in b.workers.values():
            worker.hold_at = 2
        with pytest.raises(DeadlineExceeded, match="request_timeout"):
            await b.serve()
        await b.quiet()
        assert b.workers["d1"].aborted

    run(roles, test, request_timeout_s=0.3)
