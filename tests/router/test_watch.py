"""What the watch says of a request, however it ends, while its tokens pass unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest

from cluster.errors import Unavailable
from cluster.messages import Sampling
from router.choices import Serve
from router.request import Delta, Request
from router.watch import ENDED, Watch
from tests.router.dashboards import decision

DELTAS = (Delta((5,), 3, None), Delta((6, 7), 3, None), Delta((8,), 3, "length"))


def request(name: str = "r") -> Request:
    made = Request(name, (1, 2, 3, 4), Sampling(), b"salt", "tenant-tag")
    made.decisions.append(decision("p1", "d1", 5.0))
    return made


def serving(error: Exception | None = None, hang: bool = False) -> Serve:
    async def serve(_: Request) -> AsyncGenerator[Delta, None]:
        for delta in DELTAS:
            if delta.finish and hang:
                await asyncio.Event().wait()
            if delta.finish and error:
                raise error
            yield delta

    return serve


async def taken(watch: Watch, enough: int = 99) -> list[Delta]:
    got: list[Delta] = []
    async with aclosing(watch.serve(request())) as deltas:
        async for delta in deltas:
            got.append(delta)
            if len(got) == enough:
                break
    return got


def test_a_request_that_finishes() -> None:
    watch = Watch(serving(), 10.0, 10.0)
    assert asyncio.run(taken(watch)) == list(DELTAS)
    (ended,) = watch.ended
    assert (ended.number, ended.id, ended.tenant, ended.outcome) == (1, "r", "tenant-tag", "finished")
    assert (ended.prompt_tokens, ended.cached_tokens, ended.output_tokens) == (4, 3, 4)
    assert ended.ttft_ms is not None
    assert ended.itl_ms is not None
    assert 0 <= ended.turn_ms <= ended.ttft_ms <= ended.total_ms
    assert [made.route.decode for made in ended.decisions] == ["d1"]
    parts = (watch.ttft_ms, watch.itl_ms, watch.prompt_tokens, watch.kept)
    assert [part.sums(ended.ended_s)[0] for part in parts] == [1, 2, 1, 1]


@pytest.mark.parametrize(("ttft_slo_s", "itl_slo_s", "kept"), [(10.0, 10.0, 1.0), (0.0, 10.0, 0.0), (10.0, 0.0, 0.0)])
def test_a_request_keeps_the_slo_when_both_times_do(ttft_slo_s: float, itl_slo_s: float, kept: float) -> None:
    watch = Watch(serving(), ttft_slo_s, itl_slo_s)
    asyncio.run(taken(watch))
    assert watch.kept.sums(watch.ended[0].ended_s) == (1, kept)


def test_whoever_has_enough_has_a_finished_request() -> None:
    watch = Watch(serving(), 10.0, 10.0)
    asyncio.run(taken(watch, enough=2))
    assert [(ended.outcome, ended.output_tokens) for ended in watch.ended] == [("finished", 3)]


def test_an_error_is_told_by_its_code_and_keeps_no_slo() -> None:
    watch = Watch(serving(error=Unavailable("gone")), 10.0, 10.0)
    with pytest.raises(Unavailable):
        asyncio.run(taken(watch))
    assert [(ended.outcome, ended.output_tokens) for ended in watch.ended] == [("service_unavailable", 3)]
    assert watch.kept.sums(watch.ended[0].ended_s) == (1, 0.0)


def test_a_client_that_leaves_has_cancelled() -> None:
    watch = Watch(serving(hang=True), 10.0, 10.0)

    async def leaves(arrived: Callable[[], bool]) -> None:
        task = asyncio.create_task(taken(watch))
        async with asyncio.timeout(10):
            while not arrived():  # noqa: ASYNC110 (what it waits for has no event)
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leaves(lambda: bool(watch.itl_ms._slices)))
    assert [ended.outcome for ended in watch.ended] == ["cancelled"]
    assert watch.kept.sums(watch.ended[0].ended_s) == (0, 0.0)


def test_only_the_last_requests_are_remembered() -> None:
    watch = Watch(serving(), 10.0, 10.0)

    async def many() -> None:
        for _ in range(ENDED + 7):
            await taken(watch)

    asyncio.run(many())
    assert [ended.number for ended in watch.ended] == list(range(8, ENDED + 8))
