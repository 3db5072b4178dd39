"""The block pool against a model that keeps everything in plain lists and searches them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.store_messages import BlockKey
from kvstore.blocks import BlockPool, Change


def name(i: int) -> bytes:
    return bytes([i]) * 32


def key(i: int) -> BlockKey:
    return BlockKey(name(i), 4, b"parent", b"ids")


class PoolAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.total = 8
        self.changes: list[Change] = []
        self.pool = BlockPool(self.total, self.changes)
        self.told: set[bytes] = set()  # what can be hit, from the changes alone
        self.references = dict.fromkeys(range(self.total), 0)
        self.names: dict[int, bytes] = {}  # block -> hash
        self.lru: list[int] = []  # unreferenced blocks with a hash, oldest first
        self.offered: set[int] = set()
        self.tables: list[list[int]] = []

    def model_free(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0 and block in self.names:
            self.lru.append(block)

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        blank = {b for b, n in self.references.items() if n == 0 and b not in self.names}
        blocks = self.pool.allocate(count)
        if count > len(blank) + len(self.lru):
            assert blocks is None
            return
        assert blocks is not None
        assert len(set(blocks)) == count
        evicted, self.lru = self.lru[: max(0, count - len(blank))], self.lru[max(0, count - len(blank)) :]
        assert set(blocks) == set(evicted) | (set(blocks) & blank)
        for block in blocks:
            self.names.pop(block, None)
            self.offered.discard(block)
            self.references[block] = 1
        self.tables.append(blocks)

    @rule(hashes=st.lists(st.integers(0, 11), max_size=5))
    def match(self, hashes: list[int]) -> None:
        found = self.pool.match([name(h) for h in hashes])
        expected = []
        for h in hashes:
            owner = [b for b, n in self.names.items() if n == name(h)]
            if not owner:
                break
            expected.append(owner[0])
        assert found == expected
        for block in found:
            if self.references[block] == 0:
                self.lru.remove(block)
            self.references[block] += 1
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        for block in reversed(table):
            self.model_free(block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.retain(table)
        for block in table:
            self.references[block] += 1
        self.tables.append(list(table))

    @precondition(lambda self: any(self.references.values()))
    @rule(data=st.data(), h=st.integers(0, 11))
    def register(self, data: st.DataObject, h: int) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.references.items() if n]))
        self.pool.register(block, key(h), "tenant")
        if block not in self.names and name(h) not in self.names.values():
            self.names[block] = name(h)

    @rule(count=st.integers(1, 3))
    def write_the_oldest_ahead_of_eviction(self, count: int) -> None:
        """Retained, offered, given back: they are again the ones to be evicted first."""
        expected = [block for block in self.lru if block not in self.offered][:count]
        blocks = self.pool.oldest_unoffered(count)
        assert blocks == expected
        self.pool.retain(blocks)
        assert [block for block, _ in self.pool.offer(blocks)] == blocks
        assert self.pool.offer(blocks) == []
        self.pool.free(blocks, oldest=True)
        self.offered.update(blocks)
        self.lru = blocks + [block for block in self.lru if block not in blocks]

    @precondition(lambda self: any(self.references.values()))
    @rule(data=st.data())
    def offer_a_used_one(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.references.items() if n]))
        expected = [(block, self.names[block])] if block in self.names and block not in self.offered else []
        assert [(b, n.key.hash) for b, n in self.pool.offer([block])] == expected
        self.offered.update(b for b, _ in expected)

    @rule()
    def the_store_is_new(self) -> None:
        self.pool.reset_offers()
        self.offered.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.used_count == sum(n > 0 for n in self.references.values())
        assert self.pool.free_count == self.total - self.pool.used_count
        assert self.pool.cached_count == len(self.lru)
        only_copies = [block for block in self.lru if block not in self.offered]
        assert self.pool.expendable_count == self.pool.free_count - len(only_copies)
        assert self.pool.oldest_unoffered(self.total) == only_copies
        for names, hit in self.changes:
            assert names, "nothing is not told"
            for what in names:
                assert (what in self.told) is not hit, "only what changed is told"
                self.told ^= {what}
        self.changes.clear()
        assert self.told == set(self.names.values()) == set(self.pool.names())


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def cached(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for block, h in zip(blocks, hashes, strict=True):
        pool.register(block, BlockKey(h, 4), "tenant")
    pool.free(blocks)
    return blocks


def test_tails_are_evicted_before_heads() -> None:
    pool = BlockPool(4)
    chain = [name(i) for i in range(4)]
    blocks = cached(pool, chain)
    assert pool.allocate(2) == [blocks[3], blocks[2]]
    assert pool.match(chain) == blocks[:2]


def test_a_hit_makes_a_chain_recent() -> None:
    pool = BlockPool(4)
    old, new = cached(pool, [name(0), name(1)]), cached(pool, [name(2), name(3)])
    pool.free(pool.match([name(0), name(1)]))
    taken = pool.allocate(2)
    assert taken is not None
    assert set(taken) == set(new)
    assert pool.match([name(0), name(1)]) == old


def test_blank_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached(pool, [name(0)])
    assert pool.allocate(2) is not None
    assert pool.cached_count == 1
    assert pool.match([name(0)]) != []


def test_the_second_block_of_a_hash_stays_unregistered() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.register(first, key(0), "tenant")
    pool.register(second, key(0), "tenant")
    pool.free([first, second])
    assert pool.cached_count == 1
    assert pool.match([name(0)]) == [first]


def test_freeing_twice_is_our_bug_and_is_heard() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def test_a_block_is_offered_with_all_it_takes_to_verify_it_and_its_tenant() -> None:
    pool = BlockPool(2)
    named, nameless = pool.allocate(2) or []
    pool.register(named, key(7), "alice")
    ((block, told),) = pool.offer([named, nameless])
    assert (block, told.key, told.tenant) == (named, key(7), "alice")


def test_check_notices_a_broken_book() -> None:
    pool = BlockPool(2)
    cached(pool, [name(0)])
    pool._references[0] = 1
    with pytest.raises(AssertionError):
        pool.check()


def test_blocks_known_by_hash_alone_are_hit_and_evicted_and_never_offered() -> None:
    changes: list[Change] = []
    pool = BlockPool(3, changes)
    blocks = pool.allocate(2) or []
    pool.register_all(blocks, [name(0), name(1)])
    assert pool.offer(blocks) == []
    pool.free(blocks)
    pool.check()
    assert pool.expendable_count == 3
    assert pool.oldest_unoffered(9) == []
    found = pool.match([name(0), name(1), name(2)])
    assert found == blocks
    pool.free(found)
    pool.reset_offers()
    pool.check()
    pool.allocate(3)
    assert changes == [([name(0), name(1)], True), ([name(1), name(0)], False)]
    pool.check()
