"""The map of who has which block, against one that keeps sets of pairs and searches them."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore import prefix_map as prefix_map_module
from kvstore.prefix_map import PrefixMap, split

CHAIN = [hashlib.sha256(b"%d" % i).digest() for i in range(2_000)]
NAMES = CHAIN[:8]
HASHES = st.lists(st.sampled_from(NAMES), max_size=8)


@pytest.fixture(autouse=True)
def swept_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_map_module, "RETIRED", 2)
    monkeypatch.setattr(prefix_map_module, "SWEEP", 3)
    monkeypatch.setattr(prefix_map_module, "MAX_SHARED", 5)


def leading(has: set[bytes], hashes: list[bytes]) -> int:
    return next((i for i, name in enumerate(hashes) if name not in has), len(hashes))


class MapAgainstModel(RuleBasedStateMachine):
    """Owners come and go, and their numbers are given out again."""

    def __init__(self) -> None:
        super().__init__()
        self.map = PrefixMap()
        self.model: dict[int, set[bytes]] = {}  # owner -> what it has

    @rule()
    def join(self) -> None:
        owner = self.map.join()
        assert owner not in self.model
        self.model[owner] = set()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        self.map.leave(owner)
        del self.model[owner]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), hashes=HASHES)
    def put(self, data: st.DataObject, hashes: list[bytes]) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        self.map.put(owner, hashes)
        self.model[owner] |= set(hashes)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), hashes=HASHES)
    def delete(self, data: st.DataObject, hashes: list[bytes]) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        self.map.delete(owner, hashes)
        self.model[owner] -= set(hashes)

    @invariant()
    def agrees(self) -> None:
        for name in NAMES:
            assert set(self.map.owners(name)) == {owner for owner, has in self.model.items() if name in has}
        for hashes in (NAMES, NAMES[3:], NAMES[::-1], [], [b"?" * 32, *NAMES], [*NAMES[:2], b"?" * 32]):
            depths = self.map.lookup(hashes)
            expected = {owner: leading(has, hashes) for owner, has in self.model.items()}
            assert {owner: depths[owner] for owner in self.model} == expected
            assert np.count_nonzero(depths) == sum(depth > 0 for depth in expected.values())
        assert {owner: self.map.count(owner) for owner in self.model} == {o: len(h) for o, h in self.model.items()}


TestMapAgainstModel = MapAgainstModel.TestCase
TestMapAgainstModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "delete", "look"]), HASHES, st.integers(0, 1)), max_size=40))
def test_the_least_recently_used_are_forgotten(steps: list[tuple[str, list[bytes], int]]) -> None:
    blocks = PrefixMap(capacity=4)
    owners = [blocks.join(), blocks.join()]
    has: dict[bytes, set[int]] = {}  # least recently used first

    def use(name: bytes) -> None:
        has[name] = has.pop(name)

    for what, hashes, who in steps:
        match what:
            case "put":
                blocks.put(owners[who], hashes)
                for name in hashes:
                    has.setdefault(name, set()).add(who)
                    use(name)
                while len(has) > 4:
                    has.pop(next(iter(has)))
            case "delete":
                blocks.delete(owners[who], hashes)
                for name in hashes:
                    has.get(name, set()).discard(who)
                has = {name: theirs for name, theirs in has.items() if theirs}
            case _:
                blocks.lookup(hashes)
                depth = max(leading({name for name in has if owner in has[name]}, hashes) for owner in (0, 1))
                if len(has) > 2:  # nobody counts uses while less than half is full
                    for name in reversed(hashes[:depth]):
                        use(name)
        assert [bool(blocks.owners(name)) for name in NAMES] == [name in has for name in NAMES]
        assert len(blocks) == len(has)
        assert [blocks.count(owner) for owner in owners] == [
            sum(o in theirs for theirs in has.values()) for o in (0, 1)
        ]


def test_a_large_map_forgets_some_at_once() -> None:
    blocks = PrefixMap(capacity=1_024)
    owner = blocks.join()
    blocks.put(owner, CHAIN[:1_024])
    assert len(blocks) == 1_024
    blocks.put(owner, CHAIN[1_024:1_025])
    assert len(blocks) == blocks.count(owner) < 1_024
    assert [bool(blocks.owners(name)) for name in CHAIN[:1_025]] == [n > 1_024 - len(blocks) for n in range(1_025)]


def test_children_are_forgotten_before_their_parents() -> None:
    blocks = PrefixMap(capacity=4)
    owner = blocks.join()
    blocks.put(owner, CHAIN[:4])
    assert blocks.lookup(CHAIN[:4])[owner] == 4
    blocks.put(owner, CHAIN[10:12])
    assert blocks.lookup(CHAIN[:4])[owner] == 2


def test_a_long_prefix_of_a_thousand_owners() -> None:
    """Also those whose bits are far apart, and many that end at the same block."""
    chance = random.Random(1)
    blocks = PrefixMap()
    expected = {blocks.join(): chance.choice([0, 1, 700, 700, 1_999, 2_000]) for _ in range(1_000)}
    for owner, depth in expected.items():
        blocks.put(owner, CHAIN[:depth])
        blocks.put(owner, CHAIN[depth + 1 :])
    depths = blocks.lookup(CHAIN)
    assert depths.shape == (1_000,)
    assert {owner: int(depth) for owner, depth in enumerate(depths)} == expected
    assert len(blocks) == 2_000


def test_who_left_takes_no_place_for_ever() -> None:
    """Numbers are given out again, and what only they had goes."""
    blocks = PrefixMap()
    stays = blocks.join()
    blocks.put(stays, CHAIN[:10])
    numbers = set()
    for _ in range(200):
        owner = blocks.join()
        numbers.add(owner)
        blocks.put(owner, CHAIN[:20])
        blocks.leave(owner)
    assert len(numbers) < 50
    for _ in range(50):  # nobody's blocks go when more have left
        blocks.leave(blocks.join())
    assert len(blocks) == 10
    assert blocks.lookup(CHAIN[:20])[stays] == 10


def test_a_number_that_left_is_not_valid() -> None:
    blocks = PrefixMap()
    owner = blocks.join()
    blocks.leave(owner)
    for change in (blocks.put, blocks.delete):
        with pytest.raises(AssertionError, match="has left"):
            change(owner, CHAIN[:1])
    with pytest.raises(AssertionError, match="has left"):
        blocks.leave(owner)


def test_hashes_are_sent_one_after_the_other() -> None:
    assert split(b"") == []
    assert split(b"".join(CHAIN[:3])) == CHAIN[:3]
