"""Who goes first when room is needed."""

import pytest

from kvstore.eviction import EvictionOrder


def order_of(*names: bytes) -> EvictionOrder:
    order = EvictionOrder()
    for name in names:
        order.add(name, pinned=False)
    return order


def test_the_least_recently_used_goes_first() -> None:
    order = order_of(b"a", b"b", b"c")
    order.touch(b"a")
    order.add(b"b", pinned=False)
    assert list(order) == [b"c", b"a", b"b"]
    assert order.first() == b"c"


def test_pinned_names_go_last_and_by_use_among_themselves() -> None:
    order = order_of(b"a", b"b", b"c")
    order.add(b"a", pinned=True)
    order.add(b"b", pinned=True)
    order.touch(b"a")
    assert (list(order), order.pinned, len(order)) == ([b"c", b"b", b"a"], 2, 3)
    order.add(b"b", pinned=False)
    assert (list(order), order.pinned) == ([b"c", b"b", b"a"], 1)


def test_what_is_not_there_is_no_error_to_discard_and_one_to_ask_for() -> None:
    order = order_of(b"a")
    order.discard(b"x")
    order.discard(b"a")
    assert b"a" not in order
    with pytest.raises(StopIteration):
        order.first()
