"""The fleet as placement computes with it: one row per worker, columns of numbers, so that a thousand cost one pass.

A row is what a worker said last plus what this router has sent it since; whoever keeps the connections puts views in
(`router/fleet.py`, or the simulator). Rows are in the order of the workers' ids, so equal fleets give equal routes
whatever order they joined in. No policy, no clock and no network; what the columns are for is `router/costs.py`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cluster.messages import Rates, Role
from cluster.perfmodel import decode_ms

if TYPE_CHECKING:  # a decision is made from a table
    from router.placement import Decision

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Columns = tuple[Floats, ...]
Depths = npt.NDArray[np.int32]  # owner's number -> leading blocks of a prompt that it has

FLOATS = 14
LOADS = 4  # of those, the first: what changes all the time
INTS = 3


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker at one moment, as one router sees it."""

    id: str
    role: Role
    node: str
    owner: int  # its number in the prefix map
    running: int  # sequences it has, queued ones included
    waiting_tokens: int  # uncomputed prompt tokens, as last reported
    context_tokens: int  # tokens whose KV its sequences have
    blocks_free: int
    blocks_total: int
    rates: Rates
    sent_tokens: int = 0  # prompt tokens to compute of jobs sent to it that no report knows of
    sent_sequences: int = 0
    sent_context: int = 0  # tokens whose KV the decode jobs among those will have


class FleetTable:
    """Columns over workers. `block_bytes`, of a whole KV block, may be set when the first worker has said it.

    The columns are public to be read: arrays of one number per worker, in the order of `ids`, until a worker comes or
    goes. A store is not a worker; of it only the node counts.
    """

    def __init__(self, block_size: int, block_bytes: int) -> None:
        self.block_size = block_size
        self.block_bytes = block_bytes
        self._ids: list[str] = []  # row -> worker, sorted
        self._rows: dict[str, int] = {}  # worker -> row
        self._fixed: dict[str, tuple[Role, str, int, Rates]] = {}  # worker -> what hardly ever changes
        self._nodes: dict[str, int] = {}  # node -> its number
        self._stores: Ints = np.zeros((2, 0), dtype=np.int64)  # column of a store: its owner's number, its node's
        self._uses = 0  # of workers by placements
        self.highest_owner = -1  # number in the prefix map that any worker or store has had
        self._lay_out(np.zeros((FLOATS, 0)), np.zeros((INTS, 0), dtype=np.int64), np.zeros(0, dtype=bool))

    def _lay_out(self, floats: Floats, ints: Ints, prefill: Bools) -> None:
        self._floats = floats
        self.queue_ms: Floats = floats[0]  # until a prompt that comes now would be started
        self.batch: Floats = floats[1]  # sequences
        self.itl_ms: Floats = floats[2]  # one decode step of those
        self.blocks_free: Floats = floats[3]
        self.prefill_rates: Columns = tuple(floats[4:8])  # ms per step, token, pair of tokens; tokens of a step
        self.decode_rates: Columns = tuple(floats[8:10])  # ms per sequence, per token of context
        self.memory_rates: Columns = tuple(floats[10:12])  # ms per fetch, per byte, from a store on its machine
        self.remote_rates: Columns = tuple(floats[12:14])  # ... from a store on another one
        self._ints = ints
        self.owner: Ints = ints[0]  # number in the prefix map
        self.node: Ints = ints[1]
        self._used: Ints = ints[2]  # when a placement used it last: a count from 1; below that: never, by its row
        self.rows: Ints = np.arange(len(prefill))
        self._used[:] = np.where(self._used > 0, self._used, self.rows - len(prefill))
        self._prefill = prefill  # whether its role is prefill
        self._divide()
        self._rows = {worker_id: row for row, worker_id in enumerate(self._ids)}
        self._derived: dict[Callable[[FleetTable], float], float] = {}

    def _divide(self) -> None:
        self.prefillers: Ints = self._prefill.nonzero()[0]  # rows whose role is prefill
        self.decoders: Ints = (~self._prefill).nonzero()[0]  # the others

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> tuple[str, ...]:
        """Row -> worker."""
        return tuple(self._ids)

    def id(self, row: int) -> str:
        return self._ids[row]

    def row(self, worker_id: str) -> int | None:
        return self._rows.get(worker_id)

    def put(self, view: WorkerView) -> None:
        """Add that worker, or bring its row up to date."""
        fixed = view.role, view.node, view.owner, view.rates
        if self._fixed.get(view.id) != fixed:
            self._put_fixed(view)
            self._fixed[view.id] = fixed
            self._derived = {}
        self.load(
            view.id,
            view.running + view.sent_sequences,
            view.waiting_tokens + view.sent_tokens,
            view.context_tokens + view.sent_context,
            view.blocks_free - -(-view.sent_context // self.block_size),
        )

    def load(self, worker_id: str, sequences: int, waiting: int, context: int, blocks_free: int) -> None:
        """What a worker that is in the table has to do now, with what was sent to it: sequences, tokens of prompts,
        queued or running, that are to be computed there, and tokens of context."""
        row, rates = self._rows[worker_id], self._fixed[worker_id][3]
        per_step, per_token, _ = rates.prefill
        # the contexts of what waits are reported by nobody
        self.queue_ms[row] = per_step * -(-waiting // rates.step_tokens) + per_token * waiting
        self.batch[row] = sequences
        self.itl_ms[row] = decode_ms(rates, sequences, context) if sequences else rates.decode[0]
        self.blocks_free[row] = blocks_free

    def _put_fixed(self, view: WorkerView) -> None:
        """That worker's row, but for its load."""
        row = self._rows.get(view.id)
        if row is None:
            row = bisect.bisect_left(self._ids, view.id)
            self._ids.insert(row, view.id)
            self._lay_out(
                np.insert(self._floats, row, 0.0, axis=1),
                np.insert(self._ints, row, 0, axis=1),
                np.insert(self._prefill, row, False),
            )
        self._prefill[row] = view.role == "prefill"
        self._divide()
        self.highest_owner = max(self.highest_owner, view.owner)
        self.owner[row], self.node[row] = view.owner, self._node(view.node)
        rates = view.rates
        columns = (*rates.prefill, rates.step_tokens, *rates.decode[1:], *rates.memory, *rates.remote)
        self._floats[LOADS:, row] = columns

    def fixed(self, figure: Callable[[FleetTable], float]) -> float:
        """What that function says of the table, if nothing that it looks at is a worker's load."""
        if figure not in self._derived:
            self._derived[figure] = figure(self)
        return self._derived[figure]

    def remove(self, worker_id: str) -> None:
        """Forget that worker; when there is none by that id, nothing happens."""
        row = self.row(worker_id)
        if row is not None:
            del self._ids[row], self._fixed[worker_id]
            self._lay_out(
                np.delete(self._floats, row, axis=1),
                np.delete(self._ints, row, axis=1),
                np.delete(self._prefill, row),
            )

    def set_store(self, owner: int, node: str) -> None:
        """A store, by its number in the prefix map, is on that node."""
        self.remove_store(owner)
        self.highest_owner = max(self.highest_owner, owner)
        self._stores = np.append(self._stores, [[owner], [self._node(node)]], axis=1)

    def remove_store(self, owner: int) -> None:
        self._stores = self._stores[:, self._stores[0] != owner]

    def placed(self, decision: Decision) -> None:
        """The workers of that decision are the ones used last."""
        for worker_id in (decision.route.prefill, decision.route.decode):
            row = None if worker_id is None else self.row(worker_id)
            if row is not None:
                self._uses += 1
                self._used[row] = self._uses

    def backlog_ms(self) -> float:
        """The least time until some worker that takes prompts would start a new one; inf: there is nobody."""
        if not self._ids:
            return math.inf
        takers = self.queue_ms[self.prefillers]
        return float((takers if takers.size else self.queue_ms).min())

    def _node(self, name: str) -> int:
        return self._nodes.setdefault(name, len(self._nodes))

    def last_used(self, rows: Ints) -> Ints:
        """Of those workers, a number that is less the longer one was not used; no two are alike."""
        return self._used[rows]

    def store_depths(self, depths: Depths) -> tuple[Floats, int]:
        """How many leading blocks the stores on each worker's own node have, and how many any store has."""
        if not self._stores.size:
            return np.zeros(len(self._ids)), 0
        owners, nodes = self._stores
        if depths.size <= self.highest_owner:
            known = owners < depths.size
            owners, nodes = owners[known], nodes[known]
        local = np.zeros(len(self._nodes))
        np.maximum.at(local, nodes, depths[owners])
        return local[self.node], int(local.max(initial=0))
