"""Workers as placement sees them, for tests of the pure part: views, tables of them, prefixes they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from cluster.messages import Rates, Role
from kvstore.prefix_map import PrefixMap
from router.table import FleetTable, WorkerView

BLOCK = 16
BLOCK_BYTES = 16_384
RATES = Rates(
    prefill=(1.0, 0.1, 0.0),
    decode=(10.0, 0.1, 1e-3),
    memory=(1.0, 1e-6),
    disk=(2.0, 2e-6),
    remote=(3.0, 4e-6),
    step_tokens=512,
)
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "b": "both"}


def view(worker_id: str, owner: int = 0, **fields: Any) -> WorkerView:
    """An idle worker; its role is what its id begins with."""
    idle: dict[str, Any] = {
        "role": ROLES[worker_id[0]],
        "node": "n1",
        "running": 0,
        "waiting_tokens": 0,
        "context_tokens": 0,
        "blocks_free": 10_000,
        "blocks_total": 10_000,
        "rates": RATES,
    }
    return WorkerView(id=worker_id, owner=owner, **(idle | fields))


def table_of(*views: WorkerView) -> FleetTable:
    table = FleetTable(BLOCK, BLOCK_BYTES)
    for one in views:
        table.put(one)
    return table


def chain(name: int, blocks: int) -> list[bytes]:
    """Hashes of a prompt of its own."""
    return [b"%d/%d" % (name, index) for index in range(blocks)]


class Known:
    """A fleet of views and what they have cached."""

    def __init__(self, *views: WorkerView) -> None:
        self.map = PrefixMap()
        self.table = FleetTable(BLOCK, BLOCK_BYTES)
        self.owners: dict[str, int] = {}
        self.views: dict[str, WorkerView] = {}
        for one in views:
            self.owners[one.id] = self.map.join()
            self.put(one)

    def put(self, one: WorkerView) -> None:
        self.views[one.id] = dataclasses.replace(one, owner=self.owners[one.id])
        self.table.put(self.views[one.id])

    def change(self, worker_id: str, **fields: Any) -> None:
        self.put(dataclasses.replace(self.views[worker_id], **fields))

    def cache(self, worker_id: str, hashes: Iterable[bytes]) -> None:
        self.map.put(self.owners[worker_id], hashes)

    def store(self, node: str, hashes: Iterable[bytes]) -> int:
        owner = self.map.join()
        self.map.put(owner, hashes)
        self.table.set_store(owner, node)
        return owner
