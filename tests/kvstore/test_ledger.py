"""The store's rules, with time as a number: who gets slabs, who loses them, and that none is ever lost or shared."""

import random

import pytest

from cluster.errors import Expired, NoSpace, ProtocolError, StoreError, TandemError
from cluster.store_messages import BlockKey, Sealed, Slab
from kvstore.ledger import Ledger, Transfer
from kvstore.slabs import Slabs, State

HOLD_S = 10.0


def keys(*names: int, partial: bool = False) -> list[BlockKey]:
    found = [BlockKey(bytes([n]) * 32, 4) for n in names]
    return [*found, BlockKey(b"", 3)] if partial else found


def sealed(*positions: int) -> list[Sealed]:
    return [Sealed(p, bytes([p])) for p in positions]


def ledger_of(slabs: int, *clients: str) -> Ledger:
    ledger = Ledger(Slabs(slabs))
    for client in clients or ("w",):
        ledger.open_session(client)
    return ledger


def counts(ledger: Ledger) -> dict[str, int]:
    ledger.slabs.check()
    return {state.value: n for state, n in ledger.slabs.counts.items() if n}


def complete(ledger: Ledger, name: str, blocks: list[BlockKey], now: float = 0.0) -> tuple[Slab, ...]:
    slabs = ledger.reserve(name, "w", blocks, HOLD_S, now)
    ledger.seal(name, sealed(*range(len(blocks))), now)
    ledger.finish(name, 1, now)
    return slabs


def test_a_handoff_from_reservation_to_cache() -> None:
    ledger = ledger_of(5)
    ledger.reserve("t", "w", keys(1, 2, partial=True), HOLD_S, 0)
    assert counts(ledger) == {"free": 2, "reserved": 3}
    ledger.seal("t", sealed(0), 1)
    assert counts(ledger) == {"free": 2, "reserved": 2, "held": 1}
    ledger.seal("t", sealed(1, 2), 1)
    ledger.finish("t", 42, 1)
    assert ledger.transfers["t"].first_token == 42
    ledger.release("t", 2)
    assert counts(ledger) == {"free": 3, "cached": 2}
    assert ledger.transfers == {}
    ledger.release("t", 3)  # once more is no error


def test_sealed_blocks_are_found_and_need_no_copy() -> None:
    ledger = ledger_of(4)
    first = complete(ledger, "a", keys(1, 2))
    second = ledger.reserve("b", "w", keys(1, 2, 3), HOLD_S, 0)
    assert [(s.index, s.generation) for s in second[:2]] == [(s.index, s.generation) for s in first]
    assert [s.sealed for s in second] == [True, True, False]
    ledger.release("a", 0)
    assert counts(ledger) == {"free": 1, "held": 2, "reserved": 1}


def test_all_or_nothing() -> None:
    ledger = ledger_of(3)
    complete(ledger, "a", keys(1))
    ledger.release("a", 0)
    before = counts(ledger)
    with pytest.raises(NoSpace, match="3 slabs are needed and 2 of 3"):
        ledger.reserve("b", "w", keys(1, 2, 3, 4), HOLD_S, 0)
    assert counts(ledger) == before
    assert "b" not in ledger.transfers
    assert len(ledger.reserve("c", "w", keys(2, 3, 4), HOLD_S, 0)) == 3


def test_eviction_takes_the_oldest_chain_tail_first_and_never_a_held_block() -> None:
    ledger = ledger_of(6)
    for name, chain in (("old", (1, 2)), ("new", (3, 4)), ("held", (5, 6))):
        complete(ledger, name, keys(*chain))
    ledger.release("old", 0)
    ledger.release("new", 0)
    ledger.slabs.take_changes()
    ledger.reserve("x", "w", keys(10), HOLD_S, 0)
    ledger.reserve("y", "w", keys(11, 12), HOLD_S, 0)
    gone = [change.hash[0] for change in ledger.slabs.take_changes() if not change.present]
    assert gone == [2, 1, 4]
    with pytest.raises(NoSpace):
        ledger.reserve("z", "w", keys(20, 21), HOLD_S, 0)
    assert ledger.slabs.evictions == 3


def test_a_hit_is_never_evicted_for_the_same_reservation() -> None:
    ledger = ledger_of(2)
    complete(ledger, "a", keys(1, 2))
    ledger.release("a", 0)
    slabs = ledger.reserve("b", "w", keys(1, 9), HOLD_S, 0)
    assert [s.sealed for s in slabs] == [True, False]
    assert slabs[0].index != slabs[1].index


def test_a_slab_that_changes_hands_changes_its_generation() -> None:
    ledger = ledger_of(1)
    seen = set()
    for i in range(3):
        (slab,) = complete(ledger, f"t{i}", keys(i))
        seen.add(slab.generation)
        ledger.release(f"t{i}", 0)
    assert len(seen) == 3


def test_of_two_writers_of_a_block_the_first_to_seal_wins() -> None:
    ledger = ledger_of(4, "w", "v")
    a = ledger.reserve("a", "w", keys(1, 2), HOLD_S, 0)
    b = ledger.reserve("b", "v", keys(1, 2), HOLD_S, 0)
    assert not {s.index for s in a} & {s.index for s in b}
    ledger.seal("b", sealed(0), 0)
    ledger.seal("a", sealed(0, 1), 0)
    ledger.seal("b", sealed(1), 0)
    assert counts(ledger) == {"free": 2, "held": 2}
    tables = [[entry.index for entry in ledger.transfers[t].entries if entry] for t in "ab"]
    assert tables[0] == tables[1] == [b[0].index, a[1].index]
    ledger.release("a", 0)
    assert counts(ledger) == {"free": 2, "held": 2}
    ledger.release("b", 0)
    assert counts(ledger) == {"free": 2, "cached": 2}


def test_sealing_twice_is_sealing_once() -> None:
    ledger = ledger_of(2)
    ledger.reserve("t", "w", keys(1, partial=True), HOLD_S, 0)
    assert ledger.seal("t", sealed(0), 0) == 1
    assert ledger.seal("t", sealed(0, 1), 0) == 1
    assert counts(ledger) == {"held": 2}


def test_a_transfer_is_not_finished_with_holes() -> None:
    ledger = ledger_of(2)
    ledger.reserve("t", "w", keys(1, 2), HOLD_S, 0)
    ledger.seal("t", sealed(1), 0)
    with pytest.raises(ProtocolError, match="1 blocks not sealed"):
        ledger.finish("t", 5, 0)
    with pytest.raises(ProtocolError, match="2 blocks"):
        ledger.seal("t", sealed(2), 0)


def test_a_reservation_needs_a_session_and_a_new_name() -> None:
    ledger = ledger_of(4)
    with pytest.raises(StoreError, match="session"):
        ledger.reserve("t", "stranger", keys(1), HOLD_S, 0)
    ledger.reserve("t", "w", keys(1), HOLD_S, 0)
    with pytest.raises(StoreError, match="exists"):
        ledger.reserve("t", "w", keys(2), HOLD_S, 0)
    with pytest.raises(ProtocolError, match="session already"):
        ledger.open_session("w")


@pytest.mark.parametrize("renew", ["seal", "hold", "finish"])
def test_a_hold_lasts_from_its_last_renewal(renew: str) -> None:
    ledger = ledger_of(2)
    ledger.reserve("t", "w", keys(1), HOLD_S, 0)
    ledger.seal("t", sealed(0), 0)
    act = {
        "seal": lambda: ledger.seal("t", sealed(0), 8),
        "hold": lambda: ledger.hold("t", HOLD_S, 8),
        "finish": lambda: ledger.finish("t", 1, 8),
    }[renew]
    act()
    assert ledger.hold("t", 0, 17.9) == pytest.approx(0.1)
    with pytest.raises(Expired):
        ledger.hold("t", 10, 18)
    assert ledger.expired == 1
    assert counts(ledger) == {"free": 1, "cached": 1}


def test_a_shorter_hold_shortens_nothing() -> None:
    ledger = ledger_of(1)
    ledger.reserve("t", "w", keys(1), HOLD_S, 0)
    assert ledger.hold("t", 1, 0) == HOLD_S


def test_nothing_expires_under_a_follower() -> None:
    ledger = ledger_of(2)
    complete(ledger, "t", keys(1, partial=True))
    transfer = ledger.follow("t", 5)
    ledger.expire(1000)
    assert counts(ledger) == {"held": 2}
    ledger.release("t", 1000)
    assert counts(ledger) == {"held": 2}, "another may release; who still reads keeps it"
    ledger.unfollow(transfer, 1000)
    assert counts(ledger) == {"free": 1, "cached": 1}


def test_a_reader_that_leaves_without_a_word_leaves_a_hold() -> None:
    ledger = ledger_of(1)
    complete(ledger, "t", keys(1))
    ledger.unfollow(ledger.follow("t", 5), 100)
    assert ledger.hold("t", 0, 100) == HOLD_S
    ledger.expire(111)
    assert counts(ledger) == {"cached": 1}


def test_what_an_expired_writer_may_still_touch_is_nobodys_until_it_says_so() -> None:
    ledger = ledger_of(3)
    ledger.reserve("t", "w", keys(1, 2, 3), HOLD_S, 0)
    ledger.seal("t", sealed(0), 0)
    ledger.expire(11)
    assert counts(ledger) == {"cached": 1, "quarantined": 2}
    with pytest.raises(Expired):
        ledger.seal("t", sealed(1), 12)
    with pytest.raises(NoSpace):
        ledger.reserve("u", "w", keys(4, 5), HOLD_S, 12)
    ledger.revoke("t", "late", 12)
    assert counts(ledger) == {"cached": 1, "free": 2}


def test_what_a_lost_writer_had_is_free_only_when_it_is_surely_gone() -> None:
    ledger = ledger_of(6, "w", "v")
    for client, name in (("w", 10), ("v", 20)):
        ledger.reserve(client, client, keys(name, name + 1, partial=True), HOLD_S, 0)
        ledger.seal(client, sealed(0), 0)
    lost = ledger.close_session("w")
    assert [t.id for t in lost] == ["w"]
    assert counts(ledger) == {"held": 2, "reserved": 2, "quarantined": 2}
    ledger.forget("w")
    assert counts(ledger) == {"held": 2, "reserved": 2, "free": 2}
    transfer = ledger.follow("w", 1)
    assert transfer.failure is not None
    assert transfer.sealed(0) is not None, "what was sealed can still be read"
    assert transfer.sealed(1) is None
    ledger.unfollow(transfer, 1)
    ledger.expire(12)
    assert counts(ledger) == {"cached": 2, "quarantined": 2, "free": 2}, "the other has expired meanwhile"


def test_a_finished_handoff_survives_its_writer() -> None:
    ledger = ledger_of(1)
    complete(ledger, "t", keys(1))
    assert ledger.close_session("w") == []
    assert ledger.follow("t", 1).failure is None


def test_revoking_frees_at_once_but_not_under_a_follower() -> None:
    ledger = ledger_of(3)
    ledger.reserve("t", "w", keys(1, 2, partial=True), HOLD_S, 0)
    ledger.seal("t", sealed(0), 0)
    transfer = ledger.follow("t", 0)
    ledger.revoke("t", "aborted", 1)
    assert counts(ledger) == {"free": 2, "held": 1}
    assert "aborted" in str(transfer.failure)
    with pytest.raises(Expired, match="aborted"):
        ledger.seal("t", sealed(1), 1)
    ledger.unfollow(transfer, 2)
    assert counts(ledger) == {"free": 2, "cached": 1}
    ledger.revoke("t", "again", 2)


def test_changes_tell_the_whole_story() -> None:
    ledger = ledger_of(3)
    complete(ledger, "t", keys(1, 2, partial=True))
    changes = ledger.slabs.take_changes()
    assert [(c.hash[0], c.present) for c in changes] == [(1, True), (2, True)], "partial blocks have no name"
    assert ledger.slabs.take_changes() == []
    assert ledger.slabs.findable() == changes


def test_a_sealed_block_says_what_its_name_was_made_of_and_whose_it_is() -> None:
    ledger = ledger_of(4)
    key = BlockKey(b"h" * 32, 4, b"p" * 32, b"ids")
    ledger.reserve("t", "w", [key, BlockKey(b"", 3)], HOLD_S, 0, "me")
    ledger.seal("t", sealed(0, 1), 0)
    entry = ledger.slabs.find(key.hash)
    assert entry is not None
    assert (entry.key, entry.tenant) == (key, "me")


def test_a_handoff_may_be_larger_than_its_tenants_share_but_what_it_leaves_may_not() -> None:
    ledger = Ledger(Slabs(10, tenant_share=0.3))
    ledger.open_session("w")
    ledger.reserve("t", "w", keys(*range(8)), HOLD_S, 0, "me")
    ledger.seal("t", sealed(*range(8)), 0)
    assert counts(ledger) == {"free": 2, "held": 8}
    ledger.release("t", 1)
    assert counts(ledger) == {"free": 7, "cached": 3}
    assert [ledger.slabs.find(key.hash) is not None for key in keys(*range(8))] == [True] * 3 + [False] * 5


def test_random_lives_leak_nothing() -> None:
    """3,000 random calls with random failures: the books agree after each, and all slabs come back in the end."""
    rng = random.Random(7)
    ledger = ledger_of(24, "a", "b")
    clients, ids = {"a", "b"}, [f"t{i}" for i in range(8)]
    followed: list[Transfer] = []
    for step in range(3000):
        now, transfer = step * 0.5, rng.choice(ids)
        try:
            match rng.randrange(10):
                case 0 | 1:
                    chain = rng.randrange(4) * 10
                    blocks = keys(*range(chain, chain + rng.randrange(1, 9)), partial=rng.random() < 0.5)
                    ledger.reserve(transfer, rng.choice("ab"), blocks, rng.choice([1.0, 10.0]), now)
                case 2 | 3:
                    ledger.seal(transfer, sealed(*rng.sample(range(9), rng.randrange(1, 4))), now)
                case 4:
                    held = ledger.transfers.get(transfer)
                    if held:
                        ledger.seal(transfer, sealed(*range(len(held.keys))), now)
                    ledger.finish(transfer, 1, now)
                case 5:
                    followed.append(ledger.follow(transfer, now))
                case 6 if followed:
                    ledger.unfollow(followed.pop(rng.randrange(len(followed))), now)
                case 7:
                    ledger.release(transfer, now)
                case 8:
                    ledger.revoke(transfer, "x", now)
                case 9:
                    client = rng.choice("ab")
                    if client in clients:
                        ledger.close_session(client)
                        clients.discard(client)
                    else:
                        ledger.forget(client)
                        ledger.open_session(client)
                        clients.add(client)
        except TandemError:
            pass  # refusals are part of life; the books must agree after them too
        ledger.slabs.check()
    assert ledger.slabs.evictions > 20
    assert ledger.expired > 20
    for transfer_object in followed:
        ledger.unfollow(transfer_object, 3000)
    for client in "ab":
        ledger.close_session(client)
        ledger.forget(client)
    ledger.expire(10_000)
    assert ledger.transfers == {}
    assert set(counts(ledger)) <= {"free", "cached"}
    assert ledger.slabs.counts[State.FREE] + ledger.slabs.counts[State.CACHED] == 24
