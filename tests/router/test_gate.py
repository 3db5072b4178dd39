"""The queue in front of the fleet: turns, order, displacement, deadlines, clients that leave, fleets that come late.

The fleet is a table that the test writes, as reports of workers would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded, Overloaded, TandemError, Unavailable
from cluster.messages import Rates
from router.admission import Limits
from router.gate import Entering, Gate, GateSettings, Pass
from router.metrics import Metrics
from router.scrape import Scrape
from router.table import FleetTable, WorkerView
from tests.router.fakes import eventually

RATES = Rates((1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), step_tokens=100)
BUSY = 10_000  # waiting tokens of a worker that is given nothing more
_numbers = count()


class Rig:
    """A gate in front of one worker."""

    def __init__(self, requests: int = 8, timeout_s: float = 20.0, hold_for_start: bool = False) -> None:
        self.table = FleetTable(16, 1)
        self.changed = asyncio.Event()
        self.metrics = Metrics()
        settings = GateSettings(Limits(requests, 60.0), 4, timeout_s, hold_for_start)
        self.gate = Gate(self, settings, self.metrics)
        self.order: list[str] = []  # in which requests had their turn
        self._tasks: dict[str, asyncio.Task[Pass]] = {}

    def report(self, waiting_tokens: int = 0, running: int = 0) -> None:
        self.table.put(WorkerView("w", "both", "n", 0, running, waiting_tokens, 0, 100, 100, RATES))
        self.changed.set()

    async def send(self, name: str, tenant: str = "a", priority: int = 0, tokens: int = 10, **more: Any) -> None:
        """Start a request and let it come to the gate."""

        async def enter() -> Pass:
            passage = await self.gate.enter(Entering(name, tenant, priority, tokens, **more))
            passage.watch([["a decision"]] if self.places else [[]])
            self.order.append(name)
            return passage

        self._tasks[name] = asyncio.create_task(enter())
        await asyncio.sleep(0)

    places = True  # whether requests are placed at once

    async def turn(self, name: str) -> Pass:
        async with asyncio.timeout(5):
            return await self._tasks[name]

    def leave(self, name: str) -> None:
        self._tasks[name].cancel()

    async def refusal(self, name: str) -> TandemError:
        with pytest.raises(TandemError) as error:
            await self.turn(name)
        return error.value


def run(test: Callable[[Rig], Awaitable[None]], **settings: Any) -> None:
    async def whole() -> None:
        rig = Rig(**settings)
        await rig.gate.start()
        try:
            async with asyncio.timeout(20):
                await test(rig)
        finally:
            await rig.gate.close()

    asyncio.run(whole())


def metric(rig: Rig, line: str) -> bool:
    return line in rig.metrics.page(Scrape()).decode().splitlines()


def test_a_request_goes_at_once_when_a_worker_is_free() -> None:
    async def test(rig: Rig) -> None:
        rig.report()
        await rig.send("r")
        await rig.turn("r")
        assert len(rig.gate.queue) == 0
        assert metric(rig, "tandem_queue_seconds_count 1.0")

    run(test)


def test_requests_wait_for_a_report_and_go_in_fair_order() -> None:
    async def test(rig: Rig) -> None:
        rig.report(BUSY)
        for name, tenant, priority in (
            ("a1", "a", 0),
            ("a2", "a", 0),
            ("late", "a", 9),
            ("b1", "b", 0),
            ("vip", "c", -1),
        ):
            await rig.send(name, tenant, priority)
        await eventually(lambda: len(rig.gate.queue) == 5)
        assert metric(rig, 'tandem_queue_requests{priority="normal"} 3.0')
        assert metric(rig, 'tandem_queue_tokens{priority="after"} 10.0')
        assert rig.order == []
        rig.report()
        for name in ("a1", "a2", "late", "b1", "vip"):
            await rig.turn(name)
        assert rig.order == ["vip", "a1", "b1", "a2", "late"]

    run(test)


def test_no_more_go_than_keeps_the_workers_busy() -> None:
    """100 tokens take 101 ms, and 250 ms of work are given ahead; nothing is placed before the test says so."""

    async def test(rig: Rig) -> None:
        rig.places = False
        rig.report()
        for number in range(6):
            await rig.send(f"r{number}", tokens=100)
        await eventually(lambda: rig.order == ["r0", "r1", "r2"])
        rig.report(200)  # two of them are at the worker now
        for name in ("r0", "r1"):
            (await rig.turn(name)).watch([["a decision"]])
        assert len(rig.gate.queue) == 3
        (await rig.turn("r2")).watch([["a decision"]])
        rig.report(100)
        await eventually(lambda: len(rig.order) == 5)
        assert rig.order[3:] == ["r3", "r4"]

    run(test)


def test_no_more_go_than_workers_have_slots_for_and_one() -> None:
    async def test(rig: Rig) -> None:
        rig.places = False
        rig.report(running=3)  # of four
        for number in range(4):
            await rig.send(f"r{number}", tokens=1)
        await eventually(lambda: len(rig.order) == 2)
        (await rig.turn("r0")).watch([["a decision"]])
        rig.report(running=4)
        await eventually(lambda: not rig.changed.is_set())
        assert rig.order == ["r0", "r1"]
        (await rig.turn("r1")).withdraw()
        rig.report(running=3)
        await eventually(lambda: len(rig.order) == 4)

    run(test)


def test_a_full_queue_refuses_or_displaces() -> None:
    async def test(rig: Rig) -> None:
        rig.report(BUSY)
        await rig.send("first", priority=1)
        await rig.send("second", priority=1)
        await rig.send("third", priority=1)
        refused = await rig.refusal("third")
        assert isinstance(refused, Overloaded)
        assert refused.retry_after_s is not None
        await rig.send("better", priority=0)
        displaced = await rig.refusal("second")
        assert isinstance(displaced, Overloaded)
        assert displaced.retry_after_s is not None
        assert metric(rig, 'tandem_refused_total{reason="door"} 1.0')
        assert metric(rig, 'tandem_refused_total{reason="displaced"} 1.0')
        rig.report()
        for name in ("better", "first"):
            await rig.turn(name)
        assert rig.order == ["better", "first"]

    run(test, requests=2)


def test_a_client_that_leaves_is_out_of_the_queue_at_once() -> None:
    async def test(rig: Rig) -> None:
        rig.report(BUSY)
        await rig.send("gone")
        await rig.send("stays")
        rig.leave("gone")
        await eventually(lambda: len(rig.gate.queue) == 1)
        rig.report()
        await rig.turn("stays")
        assert rig.order == ["stays"]

    run(test)


def test_a_client_that_leaves_in_the_moment_of_its_turn_takes_nobody_elses() -> None:
    async def test(rig: Rig) -> None:
        rig.places = False
        rig.report(BUSY)
        for number in range(6):
            await rig.send(f"r{number}", tokens=100)
        rig.report()
        while rig.gate.queue.tokens == 600:  # noqa: ASYNC110 (once it let some through, before their tasks ran)
            await asyncio.sleep(0)
        gone = [f"r{number}" for number in range(6) if f"r{number}" not in rig.order][:1]
        rig.leave(gone[0])
        await eventually(lambda: len(rig.order) == 3)
        assert gone[0] not in rig.order

    run(test)


def test_a_deadline_that_would_be_missed() -> None:
    async def test(rig: Rig) -> None:
        rig.report(BUSY)
        await rig.send("hurried", ttft_s=1.0)
        assert isinstance(await rig.refusal("hurried"), Overloaded)
        rig.report(400)
        await rig.send("possible", ttft_s=0.6)
        await eventually(lambda: len(rig.gate.queue) == 1)
        rig.report(BUSY)  # not any more
        assert "would be late" in (await rig.refusal("possible")).message
        assert metric(rig, 'tandem_refused_total{reason="late"} 1.0')
        rig.report()
        await rig.send("easy", ttft_s=0.6)
        await rig.turn("easy")

    run(test)


def test_nobody_is_there() -> None:
    async def test(rig: Rig) -> None:
        await rig.send("r")
        refused = await rig.refusal("r")
        assert type(refused) is Unavailable
        assert refused.retry_after_s is not None
        rig.report(BUSY)
        await rig.send("waits")
        rig.table.remove("w")
        rig.changed.set()
        assert type(await rig.refusal("waits")) is Unavailable

    run(test)


def test_a_deployment_that_starts_from_zero_holds_requests_until_a_worker_comes() -> None:
    async def test(rig: Rig) -> None:
        for number in range(3):
            await rig.send(f"r{number}")
        await eventually(lambda: rig.gate.needs_a_worker)
        rig.report()
        for number in range(3):
            await rig.turn(f"r{number}")
        assert not rig.gate.needs_a_worker

    run(test, hold_for_start=True)


def test_waiting_ends_with_the_request_timeout() -> None:
    async def test(rig: Rig) -> None:
        await rig.send("r")
        assert isinstance(await rig.refusal("r"), DeadlineExceeded)
        assert len(rig.gate.queue) == 0
        assert metric(rig, 'tandem_refused_total{reason="timeout"} 1.0')

    run(test, hold_for_start=True, timeout_s=0.05)


def test_closing_refuses_who_waits() -> None:
    async def test(rig: Rig) -> None:
        rig.report(BUSY)
        await rig.send("r")
        await eventually(lambda: len(rig.gate.queue) == 1)
        await rig.gate.close()
        assert type(await rig.refusal("r")) is Unavailable

    run(test)


def test_tenants_pay_for_what_they_got() -> None:
    """`cheap` finds its prompt in a cache and `failed` is lost: both are next again, before who got tokens."""

    async def test(rig: Rig) -> None:
        rig.report()
        for tenant in ("dear", "cheap", "failed"):
            await rig.send(f"{tenant}-1", tenant, tokens=20)
        dear, cheap, failed = [await rig.turn(f"{tenant}-1") for tenant in ("dear", "cheap", "failed")]
        rig.report(BUSY)
        for tenant in ("dear", "cheap", "failed"):
            await rig.send(f"{tenant}-2", tenant, tokens=1)
        dear.computed(20)
        dear.delivered(100)
        cheap.computed(1)
        failed.failed()
        rig.report()
        for tenant in ("dear", "cheap", "failed"):
            await rig.turn(f"{tenant}-2")
        assert rig.order[3:] == ["failed-2", "cheap-2", "dear-2"]

    run(test)


def test_estimates_learn_what_prompts_come_to() -> None:
    """Where prefixes are found for most prompts, a queue of so many tokens is not as long as it looks."""

    async def test(rig: Rig) -> None:
        rig.report()
        for number in range(100):
            await rig.send(f"r{number}", tokens=100)
            (await rig.turn(f"r{number}")).computed(10)
        rig.report(BUSY)
        await rig.send("next", tokens=100)
        await eventually(lambda: len(rig.gate.queue) == 1)
        assert 9 <= rig.gate.queue.tokens <= 12

    run(test)
