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
from kvstore.recency import Recency


class Name(NamedTuple):
    """What a full block is called, for whom it was computed, and which stores may have it."""

    key: BlockKey
    tenant: str
    exact: bool = True


Change = tuple[list[bytes], bool]  # hashes, and whether they can be hit from now on


class BlockPool:
    def __init__(self, num_blocks: int, changes: list[Change] | None = None) -> None:
        """`changes` takes what happens to hashes, in order; whoever gave it empties it."""
        self.total = num_blocks
        self._changes = changes
        self._references = [0] * num_blocks  # block id -> sequences and transfers that use it
        self._hash: list[bytes | None] = [None] * num_blocks  # block id -> what it can be found by
        self._by_hash: dict[bytes, int] = {}  # hash -> block id; the inverse of the list above
        self._names: dict[int, Name] = {}  # block id -> what a store would be told of it
        self._offered: set[int] = set()  # block ids of those that a store has, or was asked to take
        self._blank = deque(range(num_blocks))  # unreferenced, nothing worth keeping in them
        self._cached = Recency(num_blocks)  # unreferenced and hit-able, least recently used first
        self._unoffered: OrderedDict[int, None] = OrderedDict()  # those of them that no store was offered, same order

    @property
    def free_count(self) -> int:
        """Blocks nobody references, cached ones included."""
        return len(self._blank) + self._cached.count

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
        found: list[int] = []
        for block in map(self._by_hash.get, hashes):
            if block is None:
                break
            found.append(block)
        self.retain(found)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """That many blocks with one reference each, or None and nothing changes. Evicts only when none is blank."""
        if count > self.free_count:
            return None
        blank, references = self._blank, self._references
        blocks = [blank.popleft() for _ in range(min(count, len(blank)))] if blank else []
        if len(blocks) < count:
            blocks += self._evict(count - len(blocks))
        for block in blocks:
            references[block] = 1
        return blocks

    def retain(self, block_ids: Sequence[int]) -> None:
        """One more reference on each, for a second user of the same bytes."""
        references = self._references
        for block in block_ids:
            if references[block] == 0:
                self._cached.remove(block)  # one that is not in is of a caller that kept the id of a block it had freed
                if self._unoffered:
                    self._unoffered.pop(block, None)
            references[block] += 1

    def free(self, block_ids: Sequence[int], *, oldest: bool = False) -> None:
        """Drop one reference on each, tail first: a block is useless without those before it, so it goes sooner.

        `oldest`: blocks that were the least recently used when they were retained are so again."""
        references, hashes, names = self._references, self._hash, self._names
        cached: list[int] = []
        for block in reversed(block_ids):
            left = references[block] - 1
            assert left >= 0, f"block {block} is freed twice"
            references[block] = left
            if left:
                continue
            if hashes[block] is None:
                self._blank.append(block)
                continue
            cached.append(block)
            if names and block in names and block not in self._offered:
                self._unoffered[block] = None
                if oldest:
                    self._unoffered.move_to_end(block, last=False)
        if oldest:
            self._cached.extend_oldest(cached)
        else:
            self._cached.extend(cached)

    def register(self, block_id: int, key: BlockKey, tenant: str, exact: bool = True) -> None:
        """A referenced block is full and can be hit by its hash, unless another block has that hash already."""
        self.register_all((block_id,), (key.hash,))
        if block_id not in self._names and self._by_hash.get(key.hash) == block_id:
            self._names[block_id] = Name(key, tenant, exact)

    def register_all(self, block_ids: Iterable[int], hashes: Iterable[bytes]) -> None:
        """The same for many, of which nobody knows more than the hashes: no store is ever offered them."""
        references, known, by_hash = self._references, self._hash, self._by_hash
        new: list[bytes] = []
        for block, name in zip(block_ids, hashes, strict=True):
            assert references[block] > 0, f"block {block} is registered after it was freed"
            if known[block] is None and by_hash.setdefault(name, block) == block:
                known[block] = name
                new.append(name)
        if new:
            self._tell(new, True)

    # ------------------------------------------------------------------------------------------------------- stores
    def offer(self, block_ids: Iterable[int]) -> list[tuple[int, Name]]:
        """Those of the blocks that have a name and were not offered to a store before; from now on they were."""
        new = []
        for block in block_ids:
            name = self._names.get(block)
            if name is not None and block not in self._offered:
                self._offered.add(block)
                self._unoffered.pop(block, None)
                new.append((block, name))
        return new

    def oldest_unoffered(self, count: int) -> list[int]:
        """The least recently used cached blocks that no store was offered, oldest first."""
        return list(islice(self._unoffered, count))

    def reset_offers(self) -> None:
        """The store has lost what it had."""
        self._offered.clear()
        self._unoffered = OrderedDict((block, None) for block in self._cached if block in self._names)

    # -------------------------------------------------------------------------------------------------------- rules
    def _evict(self, count: int) -> list[int]:
        """So many of the least recently used cached blocks, without their names."""
        hashes, by_hash = self._hash, self._by_hash
        blocks = self._cached.take(count)
        lost = [name for block in blocks if (name := hashes[block]) is not None]
        for block, name in zip(blocks, lost, strict=True):
            hashes[block] = None
            del by_hash[name]
        if self._names:
            for block in blocks:
                self._names.pop(block, None)
                self._offered.discard(block)
                self._unoffered.pop(block, None)
        self._tell(lost, False)
        return blocks

    def _tell(self, hashes: list[bytes], there: bool) -> None:
        """Of what can be hit from now on, or no more; what follows its like is one change with it."""
        changes = self._changes
        if changes is None:
            return
        if changes and changes[-1][1] is there:
            changes[-1][0].extend(hashes)
        else:
            changes.append((hashes, there))

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one place and the two hash maps are inverse."""
        used = {block for block, count in enumerate(self._references) if count}
        blank, cached = set(self._blank), set(self._cached)
        assert min(self._references, default=0) >= 0
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert len(used) + len(blank) + len(cached) == self.total, "free + used != total"
        assert used | blank | cached == set(range(self.total))
        assert {name: block for block, name in enumerate(self._hash) if name is not None} == self._by_hash
        assert all(self._hash[block] is not None for block in cached)
        assert all(self._hash[block] is None for block in blank)
        assert all(name.key.hash == self._hash[block] for block, name in self._names.items())
        assert list(self._unoffered) == [b for b in self._cached if b in self._names and b not in self._offered]
        assert self._offered <= self._names.keys()
