"""What a router is told of a cache: whenever all was told it knows exactly what there is, however the telling went."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cluster.messages import CacheChange
from kvstore.prefix_map import split
from tests.workers.engine_run import Run, engine, prompt, sequence
from workers.cache_changes import PAGE, CacheChanges


def apply(known: set[bytes], change: CacheChange) -> set[bytes]:
    """As a router does."""
    known = set() if change.reset else known
    return known.difference(split(change.delete)).union(split(change.put))


def name(number: int) -> bytes:
    return number.to_bytes(32, "little")


class Telling(RuleBasedStateMachine):
    """Names come and go; frames are taken now and then; snapshots come as they were when they were made."""

    @initialize()
    def begin(self) -> None:
        self.there: set[bytes] = {name(1)}
        self.known: set[bytes] = {name(99)}  # of the connection before this one
        self.changes = CacheChanges(limit=6)
        self.level = False

    @rule(numbers=st.lists(st.integers(0, 9), max_size=8))
    def change(self, numbers: list[int]) -> None:
        step = []
        for number in numbers:
            step.append(([name(number)], name(number) not in self.there))
            self.there ^= {name(number)}
        self.changes.add(step)
        assert len(self.changes) <= 6

    @precondition(lambda self: self.changes.lost)
    @rule()
    def snapshot(self) -> None:
        self.changes.restart(sorted(self.there))

    @rule()
    def take(self) -> None:
        change = self.changes.take()
        if change is not None:
            self.known = apply(self.known, change)
        if not self.changes.lost:
            assert self.changes.take() is None
            assert self.known == self.there


TestTelling = Telling.TestCase
TestTelling.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_a_snapshot_comes_in_pages_and_what_happens_meanwhile_is_not_lost() -> None:
    names = [name(i) for i in range(2 * PAGE + 5)]
    changes = CacheChanges(limit=3 * PAGE)
    changes.restart(names)
    known: set[bytes] = set()
    pages = []
    while change := changes.take():
        pages.append((len(change.put) // 32, len(change.delete) // 32, change.reset))
        known = apply(known, change)
        if len(pages) == 1:  # one that was told, one that was not yet, and a new one
            changes.add([([names[0], names[-1]], False), ([b"n" * 32], True)])
    assert pages == [(PAGE, 0, True), (PAGE, 0, False), (5, 2, False)]
    assert known == {*names[1:-1], b"n" * 32}


def test_an_empty_cache_is_news_too() -> None:
    changes = CacheChanges(limit=1)
    assert changes.lost
    assert changes.take() is None
    changes.restart([])
    assert changes.urgent
    assert changes.take() == CacheChange(reset=True)
    assert not changes.urgent


def test_the_engine_tells_every_change_of_what_can_be_hit() -> None:
    """Registered by computing, by arrival from a store and again after eviction; the snapshot is of the same moment."""
    chance = random.Random(3)
    run = Run(engine(num_blocks=24))
    there: set[bytes] = set()
    deleted = 0
    for number in range(30):
        run.add(sequence(f"s{number}", prompt(chance.randrange(1, 60), seed=chance.randrange(6)), new=5))
        for _ in range(chance.randrange(12)):
            step = run.step()
            for order in step.fetches:
                run.deliver(order)
            for names, hit in step.cache:
                assert not there.intersection(names) if hit else there.issuperset(names)
                there ^= set(names)
                deleted += 0 if hit else len(names)
            if step.names is not None:
                assert set(step.names) == there
    step = run.engine.step(run.now, names=True)
    for names, hit in step.cache:
        (there.update if hit else there.difference_update)(names)
    assert step.names is not None
    assert set(step.names) == there == set(run.engine.pool.names())
    assert deleted > 20
    assert run.engine.step(run.now).names is None
