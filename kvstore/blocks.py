"""Which blocks of a worker's KV cache are in use, and which still hold a prefix somebody may ask for again.

Bookkeeping only: no tensors, no tokens, no policy of who gets blocks. Every operation is O(1) per block.

    allocate ──► used (references > 0) ──► free, cached (has a hash; `match` can bring it back) ──► evicted, used again
                                      └──► free, blank (has none) ─────────────────────────────────►
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks
        self._references = [0] * num_blocks  # block id -> sequences and transfers that use it
        self._hash: list[bytes | None] = [None] * num_blocks  # block id -> the hash it can be found by
        self._by_hash: dict[bytes, int] = {}  # hash -> block id; the inverse of the list above
        self._blank = deque(range(num_blocks))  # unreferenced, nothing worth keeping in them
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced and hit-able, least recently used first

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

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Block ids of the longest cached prefix of the chain; takes a reference on each."""
        found = []
        for name in hashes:
            block = self._by_hash.get(name)
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
            self._references[block] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference on each, tail first: a block is useless without those before it, so it goes sooner."""
        for block in reversed(block_ids):
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def register(self, block_id: int, name: bytes) -> None:
        """A referenced block is full and can be hit by its hash, unless another block has that hash already."""
        assert self._references[block_id] > 0, f"block {block_id} is registered after it was freed"
        if self._hash[block_id] is None and name not in self._by_hash:
            self._hash[block_id] = name
            self._by_hash[name] = block_id

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        name = self._hash[block]
        assert name is not None
        del self._by_hash[name]
        self._hash[block] = None
        return block

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one place and the two hash maps are inverse."""
        used = {block for block, count in enumerate(self._references) if count}
        blank, cached = set(self._blank), set(self._cached)
        assert min(self._references, default=0) >= 0
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert len(used) + len(blank) + len(cached) == self.total, "free + used != total"
        assert used | blank | cached == set(range(self.total))
        assert {h: b for b, h in enumerate(self._hash) if h is not None} == self._by_hash
        assert all(self._hash[block] is not None for block in cached)
        assert all(self._hash[block] is None for block in blank)
