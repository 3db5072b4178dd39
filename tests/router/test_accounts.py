"""What is counted while a request is served: for its tenant, the report and the trace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path

from cluster.errors import WorkerLost
from cluster.messages import Rates, Sampling
from router.accounts import Account
from router.admission import Limits
from router.choices import Serve
from router.gate import Entering, Gate, GateSettings
from router.metrics import Metrics
from router.recorder import Recorder
from router.report import Tally
from router.request import Delta, Request
from router.table import FleetTable, WorkerView

RATES = Rates((1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), step_tokens=100)
REQUEST = Request("r", tuple(range(20)), Sampling(max_tokens=4), b"", "00ff00ff00ff00ff", hashes=(b"h" * 32,))


class OneWorker:
    """A fleet of one that is idle until it is told otherwise."""

    def __init__(self) -> None:
        self.table = FleetTable(16, 1)
        self.changed = asyncio.Event()
        self.report(0)

    def report(self, waiting_tokens: int) -> None:
        self.table.put(WorkerView("w", "both", "n", 0, 0, waiting_tokens, 0, 9, 9, RATES))
        self.changed.set()


async def three_deltas(_: Request) -> AsyncGenerator[Delta, None]:
    for tokens, finish in (((1,), None), ((2, 3), None), ((4,), "length")):
        yield Delta(tokens, 16, finish)  # type: ignore[arg-type]


async def lost(_: Request) -> AsyncGenerator[Delta, None]:
    raise WorkerLost("all of them")
    yield


async def served(serve: Serve, tally: Tally, recorder: Recorder | None, stop_after: int = 9) -> str:
    """Serve one request of tenant `a`, or lose it. Then `b`, which had 20 tokens, and `a` ask again: who is first?"""
    fleet = OneWorker()
    gate = Gate(fleet, GateSettings(Limits(8), 4, 20.0), Metrics())
    await gate.start()
    (await gate.enter(Entering("b0", "b", 0, 20))).watch([[1]])
    passage = await gate.enter(Entering("a0", "a", 0, 20))
    passage.watch([[1]])
    fleet.report(10_000)
    order: list[str] = []

    async def ask(tenant: str) -> None:
        (await gate.enter(Entering(f"{tenant}1", tenant, 0, 1))).watch([[1]])
        order.append(tenant)

    asking = [asyncio.create_task(ask(tenant)) for tenant in "ba"]
    await asyncio.sleep(0)
    account = Account(serve, passage, 0.0, tally, recorder)
    with suppress(WorkerLost):
        async with aclosing(account.serve(REQUEST)) as deltas:
            async for _ in deltas:
                stop_after -= 1
                if not stop_after:
                    break
    fleet.report(0)
    async with asyncio.timeout(5):
        await asyncio.gather(*asking)
    await gate.close()
    return order[0]


def test_a_request_is_counted_for_everybody(tmp_path: Path) -> None:
    async def test() -> None:
        tally, recorder = Tally(), Recorder(str(tmp_path), "router", 16)
        # 4 prompt tokens were computed and 4 were delivered, which count twice: 12 against 20
        assert await served(three_deltas, tally, recorder) == "a"
        assert (tally.requests, tally.prompt_tokens, tally.uncached_tokens, tally.output_tokens) == (1, 20, 4, 4)
        await recorder.close()

    asyncio.run(test())
    line = json.loads((tmp_path / "router.jsonl").read_text().splitlines()[1])
    assert (line["prompt_tokens"], line["output_tokens"], line["cached_tokens"]) == (20, 4, 16)
    assert line["tenant"] == 0x00FF00FF00FF
    assert line["blocks"][0] == int.from_bytes(b"h" * 6)
    assert len(line["blocks"]) == 2
    assert line["ttft_ms"] > 0
    assert line["itl_ms"] >= 0


def test_nobody_pays_for_what_was_lost_before_it_began() -> None:
    async def test() -> None:
        tally = Tally()
        assert await served(lost, tally, None) == "a"
        assert (tally.requests, tally.uncached_tokens, tally.output_tokens) == (1, 0, 0)

    asyncio.run(test())


def test_what_was_served_before_the_client_left_is_counted(tmp_path: Path) -> None:
    async def test() -> None:
        tally, recorder = Tally(), Recorder(str(tmp_path), "router", 16)
        await served(three_deltas, tally, recorder, stop_after=2)
        assert tally.output_tokens == 3
        await recorder.close()

    asyncio.run(test())
    assert json.loads((tmp_path / "router.jsonl").read_text().splitlines()[1])["output_tokens"] == 3
