"""The slabs of an arena as a state machine: rules one by one, then whatever random callers do to it."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cluster.store_messages import BlockKey
from kvstore.slabs import Entry, Slabs, State


def name_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def cache(slabs: Slabs, *numbers: int, tenant: str = "") -> None:
    """A chain that is written, read by nobody and left, tail first."""
    entries = [slabs.seal(slabs.take(), BlockKey(name_of(n), 4), b"", tenant) for n in numbers]
    for entry in reversed(entries):
        slabs.drop(entry)


def here(slabs: Slabs, *numbers: int) -> list[int]:
    slabs.check()
    return [n for n in numbers if slabs.find(name_of(n)) is not None]


def test_an_entry_says_what_its_block_is_until_the_slab_changes_hands() -> None:
    slabs = Slabs(1)
    key = BlockKey(name_of(1), 4, name_of(0), b"ids")
    entry = slabs.seal(slabs.take(), key, b"crc", "tenant")
    assert (entry.key, entry.checksums, entry.tenant) == (key, b"crc", "tenant")
    slabs.drop(entry)
    again = slabs.take()
    assert (again.hash, again.checksums, again.tenant) == (b"", b"", "")
    assert again.generation == 2


def test_a_tenant_that_caches_too_much_evicts_its_own_and_nobody_elses() -> None:
    slabs = Slabs(10, tenant_share=0.3)
    cache(slabs, 1, 2, tenant="a")
    cache(slabs, 10, 11, 12, tenant="b")
    cache(slabs, 13, 14, tenant="b")
    assert here(slabs, 1, 2, 10, 11, 12, 13, 14) == [1, 2, 10, 13, 14]
    assert slabs.evictions == 2


def test_what_a_tenant_holds_does_not_count_until_it_lets_go() -> None:
    slabs = Slabs(10, tenant_share=0.2)
    entries = [slabs.seal(slabs.take(), BlockKey(name_of(n), 4), b"", "a") for n in range(6)]
    assert here(slabs, *range(6)) == list(range(6))
    for entry in reversed(entries):
        slabs.drop(entry)
    assert here(slabs, *range(6)) == [0, 1]


def test_pinned_blocks_go_last() -> None:
    slabs = Slabs(8)
    assert slabs.pin([name_of(1), name_of(2)], True) == [name_of(1), name_of(2)]
    cache(slabs, 1, 2, 3, 4, 5, 6)
    assert slabs.pinned == 2
    assert slabs.evict(4) == 4
    assert here(slabs, *range(1, 7)) == [1, 2]
    assert slabs.evict(9) == 2, "they are soft"


def test_only_a_quarter_can_be_pinned_and_the_answer_says_which() -> None:
    slabs = Slabs(8)
    cache(slabs, *range(8))
    assert slabs.pin([name_of(n) for n in range(8)], True) == [name_of(0), name_of(1)]
    assert slabs.pin([name_of(0)], True) == [name_of(0)], "pinning twice is pinning once"
    assert slabs.pin([name_of(0)], False) == [name_of(0)]
    assert slabs.pin([name_of(5), name_of(6)], True) == [name_of(5)]
    slabs.evict(6)
    assert here(slabs, *range(8)) == [1, 5]


def test_a_block_that_was_pinned_stays_so_while_it_is_held_and_when_it_comes_back() -> None:
    slabs = Slabs(8)
    slabs.pin([name_of(1)], True)
    for _ in range(2):
        cache(slabs, 1, 2)
        entry = slabs.find(name_of(1))
        assert entry is not None
        slabs.hold(entry)
        assert slabs.pinned == 0, "it is held: eviction does not concern it"
        slabs.drop(entry)
        assert slabs.pinned == 1
        slabs.evict(2)


def test_surplus_asks_for_a_tenth_once_less_than_a_twentieth_is_free() -> None:
    slabs = Slabs(100)
    cache(slabs, *range(95))
    assert slabs.surplus == 0
    cache(slabs, 95)
    assert slabs.surplus == 6
    slabs.evict(slabs.surplus)
    assert (slabs.surplus, slabs.counts[State.FREE]) == (0, 10)


def test_in_a_tiny_arena_nothing_is_evicted_ahead() -> None:
    slabs = Slabs(8)
    cache(slabs, *range(8))
    assert slabs.surplus == 0


def test_a_forgotten_block_is_free_when_its_last_holder_leaves() -> None:
    slabs = Slabs(4)
    cache(slabs, 1, 2)
    entry = slabs.find(name_of(1))
    assert entry is not None
    slabs.hold(entry)
    slabs.take_changes()
    assert slabs.forget(name_of(1))
    assert slabs.forget(name_of(2))
    assert not slabs.forget(name_of(3))
    assert [(c.hash, c.present) for c in slabs.take_changes()] == [(name_of(1), False), (name_of(2), False)]
    assert (here(slabs, 1, 2), entry.state) == ([], State.HELD)
    slabs.drop(entry)
    assert slabs.counts[State.FREE] == 4


def test_the_same_block_can_be_written_again_while_a_forgotten_one_is_still_read() -> None:
    slabs = Slabs(4)
    cache(slabs, 1)
    old = slabs.find(name_of(1))
    assert old is not None
    slabs.hold(old)
    slabs.forget(name_of(1))
    cache(slabs, 1)
    new = slabs.find(name_of(1))
    assert new is not None
    assert new is not old
    slabs.drop(old)
    assert here(slabs, 1) == [1]


def test_nothing_to_take_is_an_error_and_changes_nothing() -> None:
    slabs = Slabs(1)
    slabs.take()
    with pytest.raises(IndexError):
        slabs.take()
    slabs.check()


class RandomCallers(RuleBasedStateMachine):
    """Any order of calls: the books agree, quotas hold, what is held stays, pinned blocks are the last to go."""

    reserved = Bundle("reserved")
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.slabs = Slabs(12, tenant_share=0.5)
        self.holders: dict[int, tuple[int, bytes]] = {}  # slab -> generation and hash while it is held

    @rule(target=reserved)
    def take(self) -> Any:
        if not self.slabs.available:
            with pytest.raises(IndexError):
                self.slabs.take()
            return multiple()
        before = {n for n in self.slabs.names() if self.slabs.find(n) not in self._held()}
        entry = self.slabs.take()
        for name in before - set(self.slabs.names()):
            if self.slabs.is_pinned(name):
                left = [e for n in self.slabs.names() if (e := self.slabs.find(n)) and e.state is State.CACHED]
                assert all(self.slabs.is_pinned(e.hash) for e in left), "a pinned block went before another"
        return entry

    @rule(entry=consumes(reserved), number=st.integers(0, 15), tenant=st.sampled_from("ab"), target=held)
    def seal(self, entry: Entry, number: int, tenant: str) -> Entry:
        return self._keep(self.slabs.seal(entry, BlockKey(name_of(number) if number else b"", 4), b"", tenant))

    @rule(entry=consumes(reserved), quarantine=st.booleans())
    def give_up(self, entry: Entry, quarantine: bool) -> None:
        if quarantine:
            self.slabs.quarantine(entry)
        self.slabs.release(entry)

    @rule(number=st.integers(1, 15), target=held)
    def hold(self, number: int) -> Any:
        entry = self.slabs.find(name_of(number))
        if entry is None:
            return multiple()
        self.slabs.hold(entry)
        return self._keep(entry)

    @rule(entry=consumes(held))
    def drop(self, entry: Entry) -> None:
        if entry.holders == 1:
            del self.holders[entry.index]
        self.slabs.drop(entry)

    @rule(number=st.integers(1, 15))
    def forget(self, number: int) -> None:
        entry = self.slabs.find(name_of(number))
        assert self.slabs.forget(name_of(number)) == (entry is not None)
        if entry is not None and entry.index in self.holders:
            self.holders[entry.index] = (entry.generation, b"")

    @rule(count=st.integers(0, 5))
    def evict(self, count: int) -> None:
        expected = min(count, self.slabs.counts[State.CACHED])
        assert self.slabs.evict(count) == expected

    @rule(numbers=st.lists(st.integers(1, 15)), pinned=st.booleans())
    def pin(self, numbers: list[int], pinned: bool) -> None:
        self.slabs.pin([name_of(n) for n in numbers], pinned)

    @invariant()
    def books_agree(self) -> None:
        self.slabs.check()
        for entry in self._held():
            assert (entry.generation, entry.hash) == self.holders[entry.index], "a held block changed"
        assert len(self._held()) == len(self.holders)

    def _keep(self, entry: Entry) -> Entry:
        self.holders[entry.index] = (entry.generation, entry.hash)
        return entry

    def _held(self) -> list[Entry]:
        return [entry for entry in self.slabs._entries if entry.state is State.HELD]


RandomCallers.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_random_callers = RandomCallers.TestCase
