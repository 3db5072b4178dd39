"""Who is there: the simulated workers, how they start, drain and die, and what the router's table and map know of them.

A worker's report reaches the table when it is due, not when things change; what the router has sent since is added, as
the real one does (`router/fleet.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.messages import Role
from kvstore.blocks import Change
from kvstore.prefix_map import PrefixMap
from loadtests.simulator.events import Events
from loadtests.simulator.histogram import Histogram
from loadtests.simulator.job import Sequence
from loadtests.simulator.scheduler import Hands
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.stores import Stores
from loadtests.simulator.worker import Worker
from router.table import FleetTable, WorkerView


class Sent:
    """What the router has sent a worker that no report of it knows of."""

    __slots__ = ("context", "sequences", "tokens")

    def __init__(self) -> None:
        self.tokens = self.sequences = self.context = 0


class Fleet:
    def __init__(self, settings: SimSettings, events: Events, gaps: Histogram, hands: Hands) -> None:
        self.table = FleetTable(settings.block_size, settings.block_size * settings.kv_bytes)
        self.map = PrefixMap(settings.map_blocks)
        self.workers: dict[str, Worker] = {}  # id -> those that live, draining ones included
        self.everybody: list[Worker] = []  # number -> worker, the dead included
        self.draining: set[str] = set()
        self.starting: dict[int, tuple[Role, float]] = {}  # number -> (role, since when)
        self.since_s: dict[str, float] = {}  # id -> when it came into its role or state
        most = settings.workers if settings.scale is None else max(settings.workers, settings.scale[1])
        self.stores = Stores(-(-most // settings.workers_per_node), settings.store_tokens // settings.block_size)
        self._settings = settings
        self._events = events
        self._gaps = gaps
        self._hands = hands
        self._changed: dict[Worker, None] = {}  # since their last report
        self._owners: dict[str, int] = {}  # worker id -> its number in the map
        self._sent: dict[str, Sent] = {}
        self._slots: list[int] = []  # places on nodes that workers have left, the least last
        self._places: dict[str, int] = {}  # worker id -> its place: node * workers_per_node + ...
        self._store_owners = [self._join_store(node) for node in range(len(self.stores.changes))]
        self._next = 0
        for number in range(settings.workers):
            role: Role = "both" if not settings.prefillers else "prefill" if number < settings.prefillers else "decode"
            self._join(self._number(), role)

    def _join_store(self, node: int) -> int:
        owner = self.map.join()
        if self.stores.capacity:
            self.table.set_store(owner, _node(node))
        return owner

    # -------------------------------------------------------------------------------------------------------- life
    def start(self, role: Role, then: Callable[[], None]) -> None:
        """A worker is ordered; it joins after the start-up time, and `then` is called."""
        number = self._number()
        self.starting[number] = (role, self._events.now)
        self._events.after(self._settings.start_s, self._started, number, then)

    def _started(self, number: int, then: Callable[[], None]) -> None:
        role, _ = self.starting.pop(number)
        self._join(number, role)
        then()

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _join(self, number: int, role: Role) -> None:
        s = self._settings
        place = self._slots.pop() if self._slots else len(self._places)
        worker = Worker(
            number,
            place // s.workers_per_node,
            role,
            s.rates_of(role),
            s.blocks,
            s.block_size,
            s.max_sequences,
            self._events,
            self._gaps,
            self._hands,
            self._changed,
            s.leap,
        )
        self.everybody.append(worker)
        self.workers[worker.id] = worker
        self._places[worker.id] = place
        self._owners[worker.id] = self.map.join()
        self._sent[worker.id] = Sent()
        self.since_s[worker.id] = self._events.now
        self._put(worker)

    def leave(self, worker: Worker) -> list[Sequence]:
        """The worker ends, by a failure or because it was stopped; what it still had."""
        self.table.remove(worker.id)
        self.map.leave(self._owners.pop(worker.id))
        self.draining.discard(worker.id)
        self._slots.append(self._places.pop(worker.id))
        self._slots.sort(reverse=True)
        self._changed.pop(worker, None)
        del self.workers[worker.id], self._sent[worker.id], self.since_s[worker.id]
        return worker.die()

    def drain(self, worker: Worker) -> None:
        """It gets nothing new."""
        self.draining.add(worker.id)
        self.since_s[worker.id] = self._events.now
        self.table.remove(worker.id)

    def change_role(self, worker: Worker, role: Role) -> None:
        worker.role = role
        self.since_s[worker.id] = self._events.now
        self._put(worker)

    # ---------------------------------------------------------------------------------------------------- knowledge
    def sent(self, worker_id: str, tokens: int, context: int) -> None:
        """The router has just sent it a job."""
        sent = self._sent[worker_id]
        sent.tokens += tokens
        sent.sequences += 1
        sent.context += context
        self._load(self.workers[worker_id])

    def report(self) -> None:
        """Every worker that has changed says what it has."""
        for worker in self._changed:
            if worker.id in self.workers and worker.id not in self.draining:
                worker.report()
                if self._sent[worker.id].sequences:
                    self._sent[worker.id] = Sent()
                self.table.load(worker.id, *worker.load)
        self._changed.clear()

    def report_caches(self) -> None:
        """Every worker and store says what has come into its cache and what has gone."""
        for worker in self.workers.values():
            if worker.changes:
                self._tell(self._owners[worker.id], worker.changes)
        if self.stores.capacity:
            for owner, changes in zip(self._store_owners, self.stores.changes, strict=True):
                if changes:
                    self._tell(owner, changes)

    def _tell(self, owner: int, changes: list[Change]) -> None:
        for names, there in changes:
            (self.map.put if there else self.map.delete)(owner, names)
        changes.clear()

    def _put(self, worker: Worker) -> None:
        """The worker's row, new or with another role."""
        if worker.id in self.draining:
            return
        owner, node, blocks = self._owners[worker.id], _node(worker.node), worker.pool.total
        self.table.put(WorkerView(worker.id, worker.role, node, owner, 0, 0, 0, blocks, blocks, worker.rates))
        self._load(worker)

    def _load(self, worker: Worker) -> None:
        """The same of what it has to do alone, which is far more often."""
        sent, (sequences, waiting_tokens, context_tokens, blocks_free) = self._sent[worker.id], worker.load
        self.table.load(
            worker.id,
            sequences + sent.sequences,
            waiting_tokens + sent.tokens,
            context_tokens + sent.context,
            blocks_free - -(-sent.context // self.table.block_size),
        )


def _node(number: int) -> str:
    return f"n{number}"
