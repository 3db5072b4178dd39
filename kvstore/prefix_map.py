"""Which owner has which block: one map from block hashes to sets of owners, for prompts of thousands of blocks.

An owner is a worker (what its KV cache can be hit for) or a store; it joins and gets a number, and a set of owners is a
bit mask in one integer, so walking a prompt is one dictionary lookup and one `and` per block however many owners there
are. Beyond `capacity` the least recently used blocks are forgotten. Plain data: no clock, no network, and a copy of
what others said, so good for choosing a worker and never to be trusted with more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

CAPACITY = 1_000_000  # blocks, at about 190 bytes each
RETIRED = 256  # owners that left before their bits are swept out of the map and their numbers used again
MAX_SHARED = 65_536  # masks that are kept to be shared


class PrefixMap:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._owners: OrderedDict[bytes, int] = OrderedDict()  # block -> mask of who has it; least recently used first
        self._shared: dict[int, int] = {}  # equal masks are one object: there are few, and they compare fast
        self._free: list[int] = []  # numbers that may be given out again
        self._size = 0  # numbers given out so far
        self._live = 0  # mask of the owners that have joined and not left
        self._retired: list[int] = []

    def __len__(self) -> int:
        return len(self._owners)

    def join(self) -> int:
        """A new owner's number; it has nothing yet."""
        if self._free:
            owner = self._free.pop()
        else:
            owner, self._size = self._size, self._size + 1
        self._live |= 1 << owner
        return owner

    def leave(self, owner: int) -> None:
        """The owner has nothing any more and its number is not valid any more."""
        self._live &= ~(1 << owner)
        self._retired.append(owner)
        if len(self._retired) > RETIRED:
            self._sweep()

    def put(self, owner: int, hashes: Iterable[bytes]) -> None:
        bit = 1 << owner
        for name in hashes:
            mask = self._owners.get(name, 0)
            if not mask & bit:
                self._owners[name] = self._share(mask | bit)
            self._owners.move_to_end(name)
        while len(self._owners) > self._capacity:
            self._owners.popitem(last=False)

    def delete(self, owner: int, hashes: Iterable[bytes]) -> None:
        bit = 1 << owner
        for name in hashes:
            mask = self._owners.get(name, 0)
            if mask == bit:
                del self._owners[name]
            elif mask & bit:
                self._owners[name] = self._share(mask & ~bit)

    def owners(self, name: bytes) -> tuple[int, ...]:
        """Who has that block, by number."""
        return tuple(_bits(self._owners.get(name, 0) & self._live))

    def lookup(self, hashes: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Owner number -> how many leading blocks of the chain it has. Counts as use of them."""
        depths = np.zeros(self._size, dtype=np.int32)
        running, last, depth, get = self._live, 0, 0, self._owners.get
        for depth, name in enumerate(hashes):
            mask = get(name, 0)
            if mask is last and depth:
                continue
            still, last = running & mask, mask
            if still != running:
                self._record(depths, running ^ still, depth)
                running = still
                if not running:
                    break
        else:
            depth = len(hashes)
            self._record(depths, running, depth)
        for name in reversed(hashes[:depth]):  # parents outlive their children
            self._owners.move_to_end(name)
        return depths

    def _record(self, depths: npt.NDArray[np.int32], mask: int, depth: int) -> None:
        """These owners have that many blocks."""
        if not depth or not mask:
            return
        if mask.bit_count() < 8:
            for owner in _bits(mask):
                depths[owner] = depth
            return
        packed = np.frombuffer(mask.to_bytes(-(-self._size // 8), "little"), dtype=np.uint8)
        depths[np.unpackbits(packed, count=self._size, bitorder="little").view(bool)] = depth

    def _share(self, mask: int) -> int:
        if len(self._shared) >= MAX_SHARED:
            self._shared.clear()  # owners come and go over the months
        return self._shared.setdefault(mask, mask)

    def _sweep(self) -> None:
        """Rare, and as long as the map is large: owners leave seldom, and each of them costs one bit until then."""
        for name, mask in list(self._owners.items()):
            if not mask & self._live:
                del self._owners[name]
            elif mask & ~self._live:
                self._owners[name] = self._share(mask & self._live)
        self._free += self._retired
        self._retired = []


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
