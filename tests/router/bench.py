"""A fleet of fake workers with a dispatcher on it, in the test's own event loop: no HTTP and no text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from cluster.messages import Role, Sampling
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.request import Delta, Request
from tests.router.fakes import EOS, MODEL_KEY, NAMESPACE, SECRET, FakeWorker, StaticMembership, Transfers, eventually

PROMPT = (5, 6, 7, 8)


@dataclass
class Bench:
    """A fleet of fake workers and a dispatcher on it."""

    workers: dict[str, FakeWorker]
    fleet: Fleet
    dispatcher: Dispatcher
    membership: StaticMembership
    transfers: Transfers
    deltas: list[Delta] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def finish(self) -> str | None:
        return self.deltas[-1].finish

    async def serve(self, max_tokens: int = 8) -> list[int]:
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=(EOS,))
        async with aclosing(self.dispatcher.serve(Request("r", PROMPT, sampling, b"salt", "tenant"))) as deltas:
            async for delta in deltas:
                self.deltas.append(delta)
        return self.tokens

    async def join(self, worker_id: str, role: Role) -> FakeWorker:
        """One more worker, of which the router does not know yet."""
        self.workers[worker_id] = made = await FakeWorker(worker_id, role, self.transfers).start()
        self.membership.workers.append(made.info)
        return made

    async def quiet(self) -> None:
        """Every abort has been sent and no worker runs anything."""
        await self.dispatcher.close()
        await eventually(lambda: not any(worker.running for worker in self.workers.values()))
        await eventually(lambda: all(link.idle and not link.pending for link in self.fleet.links() if link.alive))


@asynccontextmanager
async def bench(roles: str, request_timeout_s: float = 30.0, worker_timeout_s: float = 5.0) -> AsyncIterator[Bench]:
    """`roles` like "ppd": workers p1, p2, d1; b is one of role both."""
    names: dict[str, Role] = {"p": "prefill", "d": "decode", "b": "both"}
    transfers: Transfers = {}
    ids = [f"{kind}{roles[: at + 1].count(kind)}" for at, kind in enumerate(roles)]
    workers = {worker_id: await FakeWorker(worker_id, names[worker_id[0]], transfers).start() for worker_id in ids}
    membership = StaticMembership()
    membership.workers = [worker.info for worker in workers.values()]
    fleet = Fleet(membership, NAMESPACE, "router-1", SECRET, worker_timeout_s, model_key=MODEL_KEY)
    await fleet.start()
    dispatcher = Dispatcher(fleet, request_timeout_s)
    try:
        await eventually(lambda: len(fleet.snapshot()) == len(workers))
        yield Bench(workers, fleet, dispatcher, membership, transfers)
        await dispatcher.close()
    finally:
        await fleet.close()
        for worker in workers.values():
            await worker.die()


def run(roles: str, test: Callable[[Bench], Awaitable[None]], **timeouts: float) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), bench(roles, **timeouts) as one:
            await test(one)

    asyncio.run(main())
