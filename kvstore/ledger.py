"""Who may write or read which slabs, and until when: the store's transfers as a state machine over `Slabs`.

    reserve ──► seal, seal, ... ──► finish ──► release, or the hold expires ──► full blocks cached, the rest free
       │                                           ▲
       └──► revoke / the writer is lost / expires ─┘  what is sealed can be read to the end of the hold

Callers pass `now`, seconds of one monotonic clock; what has expired by then ends before anything else happens. A slab
that a writer lost without saying so is quarantined until it says so (`revoke`) or cannot write any more (`forget`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.errors import Expired, NoSpace, ProtocolError, StoreError, TandemError, WorkerLost
from cluster.store_messages import BlockKey, Sealed, Slab
from kvstore.slabs import Entry, Slabs, State


@dataclass(slots=True, eq=False)
class Transfer:
    """One handoff: a table of blocks, held until `deadline`, for as long as anybody follows it, or until released."""

    id: str
    client_id: str
    keys: tuple[BlockKey, ...]
    entries: list[Entry | None]  # position -> slab; None: given up before it was sealed
    hold_s: float
    deadline: float
    tenant: str
    followers: int = 0
    finished: bool = False
    first_token: int | None = None
    failure: TandemError | None = None  # set: no further block will be sealed
    released: bool = False

    def sealed(self, position: int) -> Entry | None:
        """The slab of a block that can be read."""
        entry = self.entries[position]
        return entry if entry is not None and entry.state is State.HELD else None

    def ready(self, start: int) -> list[tuple[int, int, Entry]]:
        """(position, tokens, slab) of the blocks from `start` to the first that cannot be read."""
        found = []
        for position in range(start, len(self.entries)):
            entry = self.sealed(position)
            if entry is None:
                break
            found.append((position, self.keys[position].tokens, entry))
        return found


class Ledger:
    def __init__(self, slabs: Slabs) -> None:
        self.slabs = slabs
        self.transfers: dict[str, Transfer] = {}
        self.expired = 0  # holds that ran out
        self._writers: set[str] = set()  # clients with an open session
        self._quarantine: dict[tuple[str, str], list[Entry]] = {}  # (client, transfer) -> slabs it may still write to

    # ------------------------------------------------------------------------------------------------------- writers
    def open_session(self, client_id: str) -> None:
        """Raises ProtocolError when that client has one: ids are per connection."""
        if client_id in self._writers:
            raise ProtocolError(f"{client_id} has a session already; every connection needs an id of its own")
        self._writers.add(client_id)

    def close_session(self, client_id: str) -> list[Transfer]:
        """The writer's stream is gone: its unfinished transfers, which are returned, get no further block."""
        self._writers.discard(client_id)
        lost = [t for t in self.transfers.values() if t.client_id == client_id and not t.finished and not t.failure]
        for transfer in lost:
            transfer.failure = WorkerLost("the prefill worker lost its connection to the store; recompute the rest")
            self._give_up(transfer)
        return lost

    def forget(self, client_id: str) -> None:
        """The client cannot write any more: what was quarantined because of it is free."""
        for key in [key for key in self._quarantine if key[0] == client_id]:
            self._free_quarantined(key)

    def reserve(
        self, transfer_id: str, client_id: str, keys: Sequence[BlockKey], hold_s: float, now: float, tenant: str = ""
    ) -> tuple[Slab, ...]:
        """A slab for each block, all or nothing; `tenant` is whose they will count as. Raises NoSpace."""
        self.expire(now)
        if client_id not in self._writers:
            raise StoreError(f"{client_id} has no open session; connect again")
        if transfer_id in self.transfers:
            raise StoreError(f"transfer {transfer_id} exists already; every attempt needs an id of its own")
        hits = [self.slabs.find(key.hash) for key in keys]
        held = [entry for entry in hits if entry is not None]
        for entry in held:
            self.slabs.hold(entry)
        missing, available = len(hits) - len(held), self.slabs.available
        if missing > available:
            for entry in reversed(held):
                self.slabs.drop(entry)
            raise NoSpace(
                f"{missing} slabs are needed and {available} of {self.slabs.total} can be had; "
                "try again when other handoffs have ended, or raise store_memory"
            )
        entries = [entry or self.slabs.take() for entry in hits]
        deadline = now + hold_s
        self.transfers[transfer_id] = Transfer(
            transfer_id, client_id, tuple(keys), [*entries], hold_s, deadline, tenant
        )
        return tuple(Slab(entry.index, entry.generation, entry.state is State.HELD) for entry in entries)

    def check_writable(self, transfer_id: str, slabs: Collection[Slab], now: float) -> None:
        """Whether these are the transfer's, and reserved. Raises Expired, ProtocolError."""
        transfer = self._writable(transfer_id, now)
        reserved = {(e.index, e.generation) for e in transfer.entries if e is not None and e.state is State.RESERVED}
        for slab in slabs:
            if (slab.index, slab.generation) not in reserved:
                raise ProtocolError(f"slab {slab.index} is not reserved for transfer {transfer_id} any more")

    def seal(self, transfer_id: str, blocks: Sequence[Sealed], now: float) -> int:
        """These blocks' bytes are in their slabs. Sealing twice is sealing once. Returns how many were new.

        Raises Expired, ProtocolError."""
        transfer = self._writable(transfer_id, now)
        if any(not 0 <= block.position < len(transfer.entries) for block in blocks):
            raise ProtocolError(f"transfer {transfer_id} has {len(transfer.entries)} blocks and a seal named another")
        new = 0
        for block in blocks:
            entry = transfer.entries[block.position]
            if entry is not None and entry.state is State.RESERVED:
                key = transfer.keys[block.position]
                transfer.entries[block.position] = self.slabs.seal(entry, key, block.checksums, transfer.tenant)
                new += 1
        return new

    def finish(self, transfer_id: str, first_token: int | None, now: float) -> None:
        """The writer is done. Raises Expired, or ProtocolError when it left blocks out."""
        transfer = self._writable(transfer_id, now)
        left = sum(transfer.sealed(position) is None for position in range(len(transfer.entries)))
        if left:
            raise ProtocolError(f"transfer {transfer_id} is finished with {left} blocks not sealed")
        transfer.finished, transfer.first_token = True, first_token

    def revoke(self, transfer_id: str, reason: str, now: float) -> None:
        """The writer gives the transfer up and writes no more; holds also for one whose hold has expired meanwhile."""
        self.expire(now)
        transfer = self.transfers.get(transfer_id)
        if transfer is not None:
            transfer.failure = transfer.failure or StoreError(f"the prefill was given up: {reason}")
            self._give_up(transfer)
            self._release(transfer)
        for key in [key for key in self._quarantine if key[1] == transfer_id]:
            self._free_quarantined(key)

    # ------------------------------------------------------------------------------------------------------- readers
    def follow(self, transfer_id: str, now: float) -> Transfer:
        """One more reader: until `unfollow` nothing of the transfer that is sealed goes away. Raises Expired."""
        transfer = self._get(transfer_id, now)
        transfer.followers += 1
        return transfer

    def unfollow(self, transfer: Transfer, now: float) -> None:
        transfer.followers -= 1
        transfer.deadline = max(transfer.deadline, now + transfer.hold_s)
        if transfer.released:
            self._release(transfer)

    def hold(self, transfer_id: str, ttl_s: float, now: float) -> float:
        """Keep the transfer for at least that long. Returns the seconds it has left. Raises Expired."""
        transfer = self._get(transfer_id, now)
        transfer.deadline = max(transfer.deadline, now + ttl_s)
        return transfer.deadline - now

    def release(self, transfer_id: str, now: float) -> None:
        """Nobody will follow any more. A transfer that is unknown has ended already."""
        self.expire(now)
        transfer = self.transfers.get(transfer_id)
        if transfer is not None:
            self._release(transfer)

    def expire(self, now: float) -> None:
        """End the transfers whose hold ran out and that nobody follows."""
        for transfer in [t for t in self.transfers.values() if t.deadline <= now and not t.followers]:
            self.expired += 1
            self._end(transfer)

    # --------------------------------------------------------------------------------------------------------- rules
    def _get(self, transfer_id: str, now: float) -> Transfer:
        self.expire(now)
        transfer = self.transfers.get(transfer_id)
        if transfer is None:
            raise Expired(f"transfer {transfer_id} is unknown here: its hold ran out or it was given up; recompute it")
        return transfer

    def _writable(self, transfer_id: str, now: float) -> Transfer:
        transfer = self._get(transfer_id, now)
        if transfer.failure is not None:
            raise Expired(f"transfer {transfer_id} has ended: {transfer.failure.message}")
        transfer.deadline = max(transfer.deadline, now + transfer.hold_s)
        return transfer

    def _give_up(self, transfer: Transfer) -> None:
        """Quarantine what is not sealed."""
        for position, entry in enumerate(transfer.entries):
            if entry is not None and entry.state is State.RESERVED:
                transfer.entries[position] = None
                self.slabs.quarantine(entry)
                self._quarantine.setdefault((transfer.client_id, transfer.id), []).append(entry)

    def _free_quarantined(self, key: tuple[str, str]) -> None:
        for entry in self._quarantine.pop(key):
            self.slabs.release(entry)

    def _release(self, transfer: Transfer) -> None:
        transfer.released = True
        if not transfer.followers:
            self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        del self.transfers[transfer.id]
        self._give_up(transfer)
        for entry in reversed(transfer.entries):
            if entry is not None:
                self.slabs.drop(entry)
