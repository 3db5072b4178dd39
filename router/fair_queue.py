"""Who is next among requests that wait: priority, then fair shares among tenants, then first come, first served.

Fair is the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24): every tenant
has a counter of what it was given, a prompt token counting 1 and an output token `OUTPUT_WEIGHT`; the tenant with the
least is next. Prompts are charged when they leave the queue, output as it is delivered (`charge`). A tenant that had
nothing waiting starts at the least counter of those that have, so idleness saves nothing up and a newcomer starves
nobody. Each priority keeps counters of its own. Pure: no clock, no fleet, nothing awaited; what may wait at all is
`router/admission.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

OUTPUT_WEIGHT = 2  # what an output token costs against a prompt token, as in the paper


class Waiting(NamedTuple):
    """One request in the queue."""

    id: str
    tenant: str
    priority: int  # lower is earlier
    tokens: int  # prompt tokens that will have to be computed, as far as known
    arrival_s: float  # monotonic
    deadline_s: float | None = None  # monotonic time by which its first token was asked for


@dataclass(slots=True)
class _Tenant:
    """One tenant within one priority. `service`: weighted tokens it was given, and what it was lifted by."""

    service: float = 0.0
    tokens: int = 0  # waiting
    waiting: OrderedDict[str, Waiting] = field(default_factory=OrderedDict)

    @property
    def finish(self) -> float:
        """Its counter once all that waits has left."""
        return self.service + self.tokens


class _Level:
    """The tenants of one priority: the paper's algorithm."""

    def __init__(self) -> None:
        self.tenants: dict[str, _Tenant] = {}  # everybody seen
        self.active: dict[str, _Tenant] = {}  # those with something waiting
        self._left: _Tenant | None = None  # whose last request left the queue last

    def floor(self) -> float:
        """Where a tenant that had nothing waiting starts at least."""
        if self.active:
            return min(tenant.service for tenant in self.active.values())
        return self._left.service if self._left else 0.0

    def counter(self, name: str) -> float:
        """A tenant's counter if it had one more request now."""
        tenant = self.tenants.get(name)
        service = tenant.service if tenant else 0.0
        return service if name in self.active else max(service, self.floor())

    def tenant(self, name: str) -> _Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant()
        return tenant

    def push(self, item: Waiting) -> None:
        service = self.counter(item.tenant)
        tenant = self.tenant(item.tenant)
        tenant.service = service
        tenant.waiting[item.id] = item
        tenant.tokens += item.tokens
        self.active[item.tenant] = tenant

    def first(self) -> Waiting:
        """The head of the tenant that was given least; of equals, what came first."""
        heads = ((tenant.service, next(iter(tenant.waiting.values()))) for tenant in self.active.values())
        return min(heads, key=lambda head: (head[0], head[1].arrival_s, head[1].id))[1]

    def take(self, item: Waiting, charged: bool) -> None:
        tenant = self.active[item.tenant]
        del tenant.waiting[item.id]
        tenant.tokens -= item.tokens
        if charged:
            tenant.service += item.tokens
        if not tenant.waiting:
            del self.active[item.tenant]
            self._left = tenant


class FairQueue:
    """Requests in the order described above. `len(queue)` requests wait, of `queue.tokens` prompt tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._items: dict[str, Waiting] = {}
        self._levels: dict[int, _Level] = {}  # priority -> its tenants; counters outlive the requests
        self._deadlines: dict[str, Waiting] = {}  # those of the items that have one

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Waiting]:
        """In no order."""
        return iter(self._items.values())

    def with_deadline(self) -> list[Waiting]:
        return list(self._deadlines.values())

    def push(self, item: Waiting) -> None:
        """Add a request; its id must not be in the queue."""
        assert item.id not in self._items, f"request {item.id} waits already"
        self._level(item.priority).push(item)
        self._items[item.id] = item
        self.tokens += item.tokens
        if item.deadline_s is not None:
            self._deadlines[item.id] = item

    def peek(self) -> Waiting | None:
        """Who is next."""
        if not self._items:
            return None
        return self._levels[min(p for p, level in self._levels.items() if level.active)].first()

    def pop(self) -> Waiting | None:
        """Who is next leaves, and its tenant is charged for the prompt."""
        item = self.peek()
        if item is not None:
            self._take(item, charged=True)
        return item

    def remove(self, request_id: str) -> Waiting | None:
        """A request leaves unserved: nobody is charged. None: it does not wait."""
        item = self._items.get(request_id)
        if item is not None:
            self._take(item, charged=False)
        return item

    def charge(self, tenant: str, tokens: float, priority: int = 0) -> None:
        """Weighted tokens a tenant was given outside `pop`: output, or (negative) a prompt that was found in a
        cache."""
        self._level(priority).tenant(tenant).service += tokens

    def ahead(self, item: Waiting) -> int:
        """Prompt tokens predicted to leave before `item`, which may be waiting already or not yet.

        A fluid estimate: every other tenant of that priority goes on until its counter reaches the one at which `item`
        is next. Output that is delivered meanwhile, and requests that come meanwhile, are not foreseen.
        """
        earlier = sum(t.tokens for p, level in self._levels.items() if p < item.priority for t in level.active.values())
        level = self._levels.get(item.priority)
        if level is None:
            return earlier
        own = 0
        if (tenant := level.active.get(item.tenant)) is not None:
            for other in tenant.waiting.values():
                if other.id == item.id:
                    break
                own += other.tokens
        turn = level.counter(item.tenant) + own
        others = (t for name, t in level.active.items() if name != item.tenant)
        return int(earlier + own + sum(min(t.tokens, max(0.0, turn - t.service)) for t in others))

    def standing(self, item: Waiting) -> tuple[int, float]:
        """Where a newcomer would stand: (priority, its tenant's counter once it has left). Less is earlier."""
        level = self._levels.get(item.priority) or _Level()
        tenant = level.active.get(item.tenant)
        return item.priority, level.counter(item.tenant) + (tenant.tokens if tenant else 0) + item.tokens

    def worst_first(self) -> Iterator[tuple[Waiting, tuple[int, float]]]:
        """Everybody with their standing, from the one to give up first: the lowest priority, of it the tenant that
        would be served last, of it the newest (as fair queueing drops from the longest queue; McKenney,
        INFOCOM'90)."""
        for priority in sorted((p for p, level in self._levels.items() if level.active), reverse=True):
            queues = {name: list(t.waiting.values()) for name, t in self._levels[priority].active.items()}
            finishes = {name: t.finish for name, t in self._levels[priority].active.items()}
            while queues:
                name = max(queues, key=lambda name: (finishes[name], queues[name][-1].arrival_s, queues[name][-1].id))
                item = queues[name].pop()
                yield item, (priority, finishes[name])
                finishes[name] -= item.tokens
                if not queues[name]:
                    del queues[name]

    def _level(self, priority: int) -> _Level:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level()
        return level

    def _take(self, item: Waiting, charged: bool) -> None:
        self._levels[item.priority].take(item, charged)
        del self._items[item.id]
        self._deadlines.pop(item.id, None)
        self.tokens -= item.tokens
