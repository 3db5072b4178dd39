"""Which slab of an arena is in which state: a state machine without bytes, sockets or a clock.

          take                seal                     last holder leaves, has a hash
    FREE ──────► RESERVED ───────────► HELD ──────────────────────────────────────► CACHED
     ▲ ▲            │                   │ ▲ └─ last holder leaves, has none ─► FREE   │ │
     │ └─ release ──┤                   │ └───────────── hold (its hash is found) ────┘ │
     │              │ quarantine        │                                               │
     └─ release ─ QUARANTINED           └── RESERVED ◄── take evicts (LRU) ─────────────┘

A slab is in exactly one of the five states. A quarantined one may still be written to by a process that does not know
it lost it, so nobody else gets it. Who holds what, and until when, is for `kvstore/ledger.py` to say.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass


class State(enum.Enum):
    FREE = "free"
    RESERVED = "reserved"
    HELD = "held"
    CACHED = "cached"
    QUARANTINED = "quarantined"


@dataclass(slots=True, eq=False)
class Entry:
    """One slab. It has a `hash` exactly while it can be found by it."""

    index: int
    generation: int = 0
    state: State = State.FREE
    holders: int = 0  # transfers whose block this is
    hash: bytes = b""
    checksums: bytes = b""


@dataclass(frozen=True, slots=True)
class Change:
    """A block that can be found in this store from now on, or no longer."""

    hash: bytes
    generation: int
    present: bool


class Slabs:
    def __init__(self, count: int) -> None:
        self.total = count
        self.counts = Counter({State.FREE: count})  # state -> slabs
        self.evictions = 0
        self._entries = [Entry(index) for index in range(count)]
        self._free = deque(self._entries)
        self._cached: OrderedDict[bytes, Entry] = OrderedDict()  # hash -> slab nobody holds, least recently used first
        self._by_hash: dict[bytes, Entry] = {}  # hash -> sealed full block, held or cached
        self._changes: list[Change] = []

    @property
    def available(self) -> int:
        """Slabs that `take` can give."""
        return len(self._free) + len(self._cached)

    def find(self, name: bytes) -> Entry | None:
        """The sealed block of that hash; none has the empty one."""
        return self._by_hash.get(name)

    def hold(self, entry: Entry) -> None:
        """One more holder of a sealed slab."""
        entry.holders += 1
        if entry.state is State.CACHED:
            del self._cached[entry.hash]
            self._move(entry, State.HELD)

    def drop(self, entry: Entry) -> None:
        """One holder less. Callers drop a chain tail first, so that tails are evicted before what they need."""
        entry.holders -= 1
        if entry.holders == 0 and entry.hash:
            self._move(entry, State.CACHED)
            self._cached[entry.hash] = entry
        elif entry.holders == 0:
            self.release(entry)

    def take(self) -> Entry:
        """A slab for a new writer; its generation changes because its bytes are about to. IndexError: none is left."""
        entry = self._free.popleft() if self._free else self._evict()
        entry.generation += 1
        entry.hash = entry.checksums = b""
        self._move(entry, State.RESERVED)
        return entry

    def seal(self, entry: Entry, name: bytes, checksums: bytes) -> Entry:
        """A reserved slab's bytes are complete. Returns the slab to read them from, with one more holder: when another
        writer of the same block was faster, that one, and this one is free."""
        first = self.find(name)
        if first is not None:
            self.hold(first)
            self.release(entry)
            return first
        entry.checksums = checksums
        entry.holders = 1
        self._move(entry, State.HELD)
        if name:
            entry.hash = name
            self._by_hash[name] = entry
            self._changes.append(Change(name, entry.generation, True))
        return entry

    def quarantine(self, entry: Entry) -> None:
        """A reserved slab's writer lost it and may not know."""
        self._move(entry, State.QUARANTINED)

    def release(self, entry: Entry) -> None:
        """Nobody reads or writes the slab any more."""
        self._move(entry, State.FREE)
        self._free.append(entry)

    def take_changes(self) -> list[Change]:
        """What became findable or stopped being so since the last time, in order."""
        changes, self._changes = self._changes, []
        return changes

    def findable(self) -> list[Change]:
        """Everything that can be found now."""
        return [Change(name, entry.generation, True) for name, entry in self._by_hash.items()]

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one state and all maps agree with it."""
        states = Counter(entry.state for entry in self._entries)
        assert states == +self.counts, f"{states} counted, {self.counts} kept"
        assert len(self._free) == states[State.FREE]
        assert all(e.state is State.FREE for e in self._free)
        assert len(self._cached) == states[State.CACHED]
        assert all(e.state is State.CACHED for e in self._cached.values())
        for name, entry in self._by_hash.items():
            assert entry.hash == name
            assert entry.state in (State.HELD, State.CACHED)
        assert all((e.holders > 0) == (e.state is State.HELD) for e in self._entries)

    def _evict(self) -> Entry:
        if not self._cached:
            raise IndexError("no slab is free or evictable; look at `available` first")
        _, entry = self._cached.popitem(last=False)
        del self._by_hash[entry.hash]
        self._changes.append(Change(entry.hash, entry.generation, False))
        self.evictions += 1
        return entry

    def _move(self, entry: Entry, state: State) -> None:
        self.counts[entry.state] -= 1
        self.counts[state] += 1
        entry.state = state
