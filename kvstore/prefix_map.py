"""Which owner has which block: one map from block hashes to sets of owners, for prompts of thousands of blocks.

An owner is a worker (what its KV cache can be hit for) or a store; it joins and gets a number, and a set of owners is a
bit mask in one integer, so walking a prompt is one dictionary lookup per block, and an `and` where the owners change,
however many owners there are. Beyond `capacity` the least recently used blocks are forgotten. Plain data: no clock, no
network, and a copy of what others said, so good for choosing a worker and never to be trusted with more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvstore.hashing import HASH_BYTES

CAPACITY = 1_000_000  # blocks, at about 170 bytes each
RETIRED = 256  # owners that left before their bits are swept out of the map and their numbers given out again
FORGET = 256  # a part so small of the capacity is forgotten with what is beyond it
SWEEP = 256  # blocks that are swept with each change
MAX_SHARED = 65_536  # masks that are kept to be shared


class PrefixMap:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._masks: dict[bytes, int] = {}  # block -> who has it; least recently used first
        self._shared: dict[int, int] = {}  # equal masks are one object: there are few, and they compare fast
        self._counts: list[int] = []  # owner -> blocks that it has, as far as they are remembered
        self._live = 0  # mask of the owners that have joined and not left
        self._free: list[int] = []  # numbers that may be given out again: no block has their bits
        self._retired: list[int] = []  # numbers of owners that left
        self._sweeping: list[int] = []  # those whose bits are being taken out of ...
        self._unswept: list[bytes] = []  # ... these blocks

    def __len__(self) -> int:
        return len(self._masks)

    def join(self) -> int:
        """A new owner's number; it has nothing yet."""
        if self._free:
            owner = self._free.pop()
        else:
            owner = len(self._counts)
            self._counts.append(0)
        self._live |= 1 << owner
        return owner

    def leave(self, owner: int) -> None:
        """The owner has nothing any more and its number is not valid any more."""
        self._live &= ~self._bit(owner)
        self._counts[owner] = 0
        self._retired.append(owner)
        if len(self._retired) > RETIRED and not self._sweeping:
            self._sweeping, self._retired = self._retired, []
            self._unswept = list(self._masks)
        self._sweep()

    def put(self, owner: int, hashes: Iterable[bytes]) -> None:
        bit, live, masks, new = self._bit(owner), self._live, self._masks, 0
        share = self._sharing()
        alone = share(bit, bit)
        before: int | None = None  # of the block before: neighbours mostly belong to the same owners
        after, added = alone, 1
        for name in hashes:
            mask = masks.pop(name, None)  # to be the last again
            if mask is not before:
                before = mask
                if mask is None:
                    after, added = alone, 1
                elif mask & bit:
                    after, added = mask, 0
                else:
                    after, added = share(with_it := mask & live | bit, with_it), 1
            masks[name] = after
            new += added
        self._counts[owner] += new
        if len(masks) > self._capacity:
            self._forget()
        self._sweep()

    def delete(self, owner: int, hashes: Iterable[bytes]) -> None:
        bit, masks, gone = self._bit(owner), self._masks, 0
        others, share = self._live & ~bit, self._sharing()
        before, has, rest = 0, 0, 0  # of the block before, as in `put`
        for name in hashes:
            mask = masks.get(name, 0)
            if mask is not before:
                before, has, rest = mask, mask & bit, share(left := mask & others, left)
            if not has:
                continue
            gone += 1
            if rest:
                masks[name] = rest
            else:
                del masks[name]
        self._counts[owner] -= gone
        self._sweep()

    def count(self, owner: int) -> int:
        """Blocks that the owner has, as far as they are remembered."""
        return self._counts[owner]

    def owners(self, name: bytes) -> tuple[int, ...]:
        """Who has that block, by number."""
        return tuple(_bits(self._masks.get(name, 0) & self._live))

    def lookup(self, hashes: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Owner number -> how many leading blocks of the chain it has. Counts as use of them."""
        depths = np.zeros(len(self._counts), dtype=np.int32)
        running, depth = self._live, 0
        last: int | None = 0
        for mask in map(self._masks.get, hashes):
            if mask is not last:
                still = running & mask if mask else 0
                if still != running:
                    _record(depths, running ^ still, depth)
                    running = still
                if not still:
                    break
                last = mask
            depth += 1
        _record(depths, running, depth)
        masks = self._masks
        if 2 * len(masks) > self._capacity:  # else nothing will be forgotten before it can be used again
            used = hashes[:depth][::-1]  # parents outlive their children
            deque(map(masks.__setitem__, used, map(masks.pop, used)), maxlen=0)  # runs the map for its effects
        return depths

    def _forget(self) -> None:
        """The least recently used, many at once: to find the first one, a dict goes past all that have left before."""
        masks, live = self._masks, self._live
        for name in list(islice(masks, len(masks) - self._capacity + self._capacity // FORGET)):
            for loser in _bits(masks.pop(name) & live):
                self._counts[loser] -= 1

    def _bit(self, owner: int) -> int:
        bit = 1 << owner
        assert self._live & bit, f"owner {owner} has left, or never joined"
        return bit

    def _sharing(self) -> Callable[[int, int], int]:
        """To be called with a mask, twice: the one object for masks that are equal to it."""
        if len(self._shared) >= MAX_SHARED:
            self._shared.clear()  # owners come and go over the months
        return self._shared.setdefault

    def _sweep(self) -> None:
        """A little at a time, so that no change ever waits for the whole map. Bits of those who left cannot come back:
        whatever changes a mask leaves them out."""
        if not self._sweeping:
            return
        share = self._sharing()
        for name in self._unswept[-SWEEP:]:
            mask = self._masks.get(name, 0)
            if mask & ~self._live:
                if rest := mask & self._live:
                    self._masks[name] = share(rest, rest)
                else:
                    del self._masks[name]
        del self._unswept[-SWEEP:]
        if not self._unswept:
            self._free += self._sweeping
            self._sweeping = []


def split(joined: bytes) -> list[bytes]:
    """Hashes that were sent one after the other."""
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def _record(depths: npt.NDArray[np.int32], mask: int, depth: int) -> None:
    """These owners have that many blocks."""
    if not depth or not mask:
        return
    if mask.bit_count() < 8:
        while mask:  # as `_bits`, of which there would be one for every block at worst
            highest = mask.bit_length() - 1
            depths[highest] = depth
            mask ^= 1 << highest
        return
    packed = np.frombuffer(mask.to_bytes(-(-len(depths) // 8), "little"), dtype=np.uint8)
    depths[np.unpackbits(packed, count=len(depths), bitorder="little").view(bool)] = depth


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
