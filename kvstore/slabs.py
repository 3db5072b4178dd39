"""Which slab of an arena is in which state: a state machine without bytes, sockets or a clock.

          take                seal                     last holder leaves, has a hash
    FREE ──────► RESERVED ───────────► HELD ──────────────────────────────────────► CACHED ─── evict, forget ─► FREE
     ▲ ▲            │                   │ ▲ └─ last holder leaves, has none ─► FREE   │ │
     │ └─ release ──┤                   │ └───────────── hold (its hash is found) ────┘ │
     │              │ quarantine        │                                               │
     └─ release ─ QUARANTINED           └── RESERVED ◄── take evicts ───────────────────┘

A slab is in exactly one of the five states. A quarantined one may still be written to by a process that does not know
it lost it, so nobody else gets it. Only cached slabs are ever evicted: a tenant's own when it has more than its share
of them, else the least recently used of all, pinned ones last. Who holds what, and until when, is for
`kvstore/ledger.py` to say.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.store_messages import BlockKey
from kvstore.eviction import EvictionOrder

FREE_LOW, FREE_HIGH = 0.05, 0.10  # parts of the arena: with less than the first free, `surplus` asks for the second
PINNED_SHARE = 0.25  # of the slabs: what operators pin must leave room for what is used
NAMELESS = BlockKey(b"", 0)


class State(enum.Enum):
    FREE = "free"
    RESERVED = "reserved"
    HELD = "held"
    CACHED = "cached"
    QUARANTINED = "quarantined"


@dataclass(slots=True, eq=False)
class Entry:
    """One slab. Its key has a hash exactly while it can be found by it."""

    index: int
    generation: int = 0
    state: State = State.FREE
    holders: int = 0  # transfers and readers whose block this is
    key: BlockKey = NAMELESS
    checksums: bytes = b""
    tenant: str = ""

    @property
    def hash(self) -> bytes:
        return self.key.hash


@dataclass(frozen=True, slots=True)
class Change:
    """A block that can be found in this store from now on, or no longer."""

    hash: bytes
    generation: int
    present: bool


class Slabs:
    """`tenant_share`: the part of the slabs that one tenant's cached blocks may fill."""

    def __init__(self, count: int, tenant_share: float = 1.0) -> None:
        self.total = count
        self.counts = Counter({State.FREE: count})  # state -> slabs
        self.evictions = 0
        self._quota = max(1, int(count * tenant_share))
        self._entries: list[Entry] = []  # of the slabs that were ever taken: an arena of millions starts at once
        self._free: deque[Entry] = deque()  # of these
        self._order = EvictionOrder()  # hashes of the cached slabs
        self._tenants: dict[str, EvictionOrder] = {}  # tenant -> hashes of its cached slabs; never empty
        self._by_hash: dict[bytes, Entry] = {}  # hash -> sealed full block, held or cached
        self._pins: set[bytes] = set()  # hashes, here or not
        self._changes: list[Change] = []
        self._idle: list[bytes] = []  # what became cached

    @property
    def available(self) -> int:
        """Slabs that `take` can give."""
        return self.counts[State.FREE] + len(self._order)

    @property
    def surplus(self) -> int:
        """Slabs to evict so that the next writers find free ones; nothing in an arena of a few slabs."""
        free = self.counts[State.FREE]
        return int(self.total * FREE_HIGH) - free if free < int(self.total * FREE_LOW) else 0

    @property
    def pinned(self) -> int:
        """Cached slabs that are evicted last."""
        return self._order.pinned

    def find(self, name: bytes) -> Entry | None:
        """The sealed block of that hash; none has the empty one."""
        return self._by_hash.get(name)

    def names(self) -> list[bytes]:
        """Hashes of all blocks that can be found, in the order in which they were sealed."""
        return list(self._by_hash)

    def hold(self, entry: Entry) -> None:
        """One more holder of a sealed slab."""
        entry.holders += 1
        if entry.state is State.CACHED:
            self._uncache(entry)
            self._move(entry, State.HELD)

    def drop(self, entry: Entry) -> None:
        """One holder less. Callers drop a chain tail first, so that tails are evicted before what they need."""
        entry.holders -= 1
        if entry.holders == 0 and entry.hash:
            self._cache(entry)
        elif entry.holders == 0:
            self.release(entry)

    def take(self) -> Entry:
        """A slab for a new writer; its generation changes because its bytes are about to. IndexError: none is left."""
        if not self.counts[State.FREE] and not self.evict(1):
            raise IndexError("no slab is free or evictable; look at `available` first")
        entry = self._free.popleft() if self._free else self._fresh()
        entry.generation += 1
        entry.key, entry.checksums, entry.tenant = NAMELESS, b"", ""
        self._move(entry, State.RESERVED)
        return entry

    def seal(self, entry: Entry, key: BlockKey, checksums: bytes, tenant: str = "") -> Entry:
        """A reserved slab's bytes are complete. Returns the slab to read them from, with one more holder: when another
        writer of the same block was faster, that one, and this one is free."""
        first = self.find(key.hash)
        if first is not None:
            self.hold(first)
            self.release(entry)
            return first
        entry.checksums, entry.tenant = checksums, tenant
        entry.holders = 1
        self._move(entry, State.HELD)
        if key.hash:
            entry.key = key
            self._by_hash[key.hash] = entry
            self._changes.append(Change(key.hash, entry.generation, True))
        return entry

    def quarantine(self, entry: Entry) -> None:
        """A reserved slab's writer lost it and may not know."""
        self._move(entry, State.QUARANTINED)

    def release(self, entry: Entry) -> None:
        """Nobody reads or writes the slab any more."""
        self._move(entry, State.FREE)
        self._free.append(entry)

    def evict(self, count: int) -> int:
        """Free up to so many cached slabs, first the one that is first to go. Returns how many."""
        done = 0
        while done < count and len(self._order):
            self._evict(self._order.first())
            done += 1
        return done

    def forget(self, name: bytes) -> bool:
        """Nobody finds the block any more; who holds it keeps it. Returns whether it was here."""
        entry = self._by_hash.get(name)
        if entry is None:
            return False
        if entry.state is State.CACHED:
            self._uncache(entry)
            self.release(entry)
        self._unname(entry)
        return True

    def pin(self, names: Sequence[bytes], pinned: bool) -> list[bytes]:
        """Evict these blocks last, here or not, or like all others again. Returns those that took: pins are few."""
        taken = []
        limit = int(self.total * PINNED_SHARE)
        for name in names:
            if pinned and name not in self._pins and len(self._pins) >= limit:
                continue
            (self._pins.add if pinned else self._pins.discard)(name)
            taken.append(name)
            entry = self._by_hash.get(name)
            if entry is not None and entry.state is State.CACHED:
                self._order.add(name, pinned)
                self._tenants[entry.tenant].add(name, pinned)
        return taken

    def is_pinned(self, name: bytes) -> bool:
        return name in self._pins

    def take_changes(self) -> list[Change]:
        """What became findable or stopped being so since the last time, in order."""
        changes, self._changes = self._changes, []
        return changes

    def take_idle(self) -> list[bytes]:
        """Hashes of what became cached since the last time, in order; it may be gone again."""
        idle, self._idle = self._idle, []
        return idle

    def findable(self) -> list[Change]:
        """Everything that can be found now."""
        return [Change(name, entry.generation, True) for name, entry in self._by_hash.items()]

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one state and all maps agree with it."""
        states = Counter(entry.state for entry in self._entries)
        states[State.FREE] += self.total - len(self._entries)
        assert states == +self.counts, f"{states} counted, {self.counts} kept"
        assert len(self._free) == sum(entry.state is State.FREE for entry in self._entries)
        assert all(e.state is State.FREE for e in self._free)
        assert len(self._order) == states[State.CACHED]
        assert sorted(self._order) == sorted(name for own in self._tenants.values() for name in own)
        for tenant, own in self._tenants.items():
            assert 0 < len(own) <= self._quota
            assert all(self._by_hash[name].tenant == tenant for name in own)
        assert all(self._by_hash[name].state is State.CACHED for name in self._order)
        for name, entry in self._by_hash.items():
            assert entry.hash == name
            assert entry.state in (State.HELD, State.CACHED)
        assert all((e.holders > 0) == (e.state is State.HELD) for e in self._entries)
        assert self.pinned <= len(self._pins) <= int(self.total * PINNED_SHARE)

    def _fresh(self) -> Entry:
        self._entries.append(Entry(len(self._entries)))
        return self._entries[-1]

    def _cache(self, entry: Entry) -> None:
        """Nobody holds the block any more; if its tenant has too many such, one of them makes room."""
        self._move(entry, State.CACHED)
        own = self._tenants.setdefault(entry.tenant, EvictionOrder())
        for order in (self._order, own):
            order.add(entry.hash, entry.hash in self._pins)
        self._idle.append(entry.hash)
        while len(own) > self._quota:
            self._evict(own.first())

    def _uncache(self, entry: Entry) -> None:
        self._order.discard(entry.hash)
        own = self._tenants[entry.tenant]
        own.discard(entry.hash)
        if not len(own):
            del self._tenants[entry.tenant]

    def _evict(self, name: bytes) -> None:
        self.forget(name)
        self.evictions += 1

    def _unname(self, entry: Entry) -> None:
        del self._by_hash[entry.hash]
        self._changes.append(Change(entry.hash, entry.generation, False))
        entry.key = NAMELESS

    def _move(self, entry: Entry, state: State) -> None:
        self.counts[entry.state] -= 1
        self.counts[state] += 1
        entry.state = state
