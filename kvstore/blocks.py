"""Which blocks of a worker's KV cache are in use, and which still hold a prefix somebody may ask for again.

Bookkeeping only: no tensors, no tokens, no policy of who gets blocks. Every operation is O(1) per block.

    allocate ──► used (references > 0) ──► free, cached (has a name; `match` can bring it back) ──► evicted, used again
                                      └──► free, blank (has none) ─────────────────────────────────►

A named block also knows whether it was offered to a store, so that what is evicted first can be written there first.
What becomes hit-able and what ceases to be is written into a list that the pool was given, for whoever tells others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from cluster.store_messages import BlockKey


class Name(NamedTuple):
    """What a full block is called, for whom it was computed, and which stores may have it."""

    key: BlockKey
    tenant: str
    exact: bool = True


class BlockPool:
    def __init__(self, num_blocks: int, changes: list[tuple[bytes, bool]] | None = None) -> None:
        """`changes` takes (hash, whether it can be hit from now on), in order; whoever gave it empties it."""
        self.total = num_blocks
        self._changes = changes
        self._references = [0] * num_blocks  # block id -> sequences and transfers that use it
        self._name: list[Name | None] = [None] * num_blocks  # block id -> what it can be found by
        self._by_hash: dict[bytes, int] = {}  # hash -> block id; the inverse of the list above
        self._offered = [False] * num_blocks  # block id -> a store has it, or was asked to take it
        self._blank = deque(range(num_blocks))  # unreferenced, nothing worth keeping in them
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced and hit-able, least recently used first
        self._unoffered: OrderedDict[int, None] = OrderedDict()  # those of them that no store was offered, same order

    @property
    def free_count(self) -> int:
        """Blocks nobody references, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def cached_count(self) -> int:
        return len(self._cached)

    @property
    def used_count(self) -> int:
        return self.total - self.free_count

    @property
    def expendable_count(self) -> int:
        """Free blocks that can be reused without losing the only copy of anything."""
        return self.free_count - len(self._unoffered)

    def find(self, name: bytes) -> int | None:
        """The block that is hit by that hash. Nobody may hold it: retain it before anything is allocated."""
        return self._by_hash.get(name)

    def names(self) -> list[bytes]:
        """Every hash that can be hit now."""
        return list(self._by_hash)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Block ids of the longest cached prefix of the chain; takes a reference on each."""
        found = []
        for name in hashes:
            block = self.find(name)
            if block is None:
                break
            found.append(block)
        self.retain(found)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """That many blocks with one reference each, or None and nothing changes. Evicts only when none is blank."""
        if count > self.free_count:
            return None
        blocks = [self._blank.popleft() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, block_ids: Sequence[int]) -> None:
        """One more reference on each, for a second user of the same bytes."""
        for block in block_ids:
            if self._references[block] == 0:
                del self._cached[block]  # a KeyError here is a caller that kept the id of a block it had freed
                self._unoffered.pop(block, None)
            self._references[block] += 1

    def free(self, block_ids: Sequence[int], *, oldest: bool = False) -> None:
        """Drop one reference on each, tail first: a block is useless without those before it, so it goes sooner.

        `oldest`: blocks that were the least recently used when they were retained are so again."""
        for block in reversed(block_ids):
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._name[block] is None:
                self._blank.append(block)
                continue
            for order in (self._cached,) if self._offered[block] else (self._cached, self._unoffered):
                order[block] = None
                if oldest:
                    order.move_to_end(block, last=False)

    def register(self, block_id: int, key: BlockKey, tenant: str, exact: bool = True) -> None:
        """A referenced block is full and can be hit by its hash, unless another block has that hash already."""
        assert self._references[block_id] > 0, f"block {block_id} is registered after it was freed"
        if self._name[block_id] is None and key.hash not in self._by_hash:
            self._name[block_id] = Name(key, tenant, exact)
            self._by_hash[key.hash] = block_id
            if self._changes is not None:
                self._changes.append((key.hash, True))

    # ------------------------------------------------------------------------------------------------------- stores
    def offer(self, block_ids: Iterable[int]) -> list[tuple[int, Name]]:
        """Those of the blocks that have a name and were not offered to a store before; from now on they were."""
        new = []
        for block in block_ids:
            name = self._name[block]
            if name is not None and not self._offered[block]:
                self._offered[block] = True
                self._unoffered.pop(block, None)
                new.append((block, name))
        return new

    def oldest_unoffered(self, count: int) -> list[int]:
        """The least recently used cached blocks that no store was offered, oldest first."""
        return list(islice(self._unoffered, count))

    def reset_offers(self) -> None:
        """The store has lost what it had."""
        self._offered = [False] * self.total
        self._unoffered = self._cached.copy()

    # -------------------------------------------------------------------------------------------------------- rules
    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unoffered.pop(block, None)
        name = self._name[block]
        assert name is not None
        del self._by_hash[name.key.hash]
        self._name[block] = None
        self._offered[block] = False
        if self._changes is not None:
            self._changes.append((name.key.hash, False))
        return block

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one place and the two hash maps are inverse."""
        used = {block for block, count in enumerate(self._references) if count}
        blank, cached = set(self._blank), set(self._cached)
        assert min(self._references, default=0) >= 0
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert len(used) + len(blank) + len(cached) == self.total, "free + used != total"
        assert used | blank | cached == set(range(self.total))
        assert {n.key.hash: b for b, n in enumerate(self._name) if n is not None} == self._by_hash
        assert all(self._name[block] is not None for block in cached)
        assert all(self._name[block] is None for block in blank)
        assert list(self._unoffered) == [block for block in self._cached if not self._offered[block]]
        assert not any(self._offered[block] for block, name in enumerate(self._name) if name is None)
