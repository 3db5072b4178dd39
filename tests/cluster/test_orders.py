"""What operators order, as values: by name, summed up, and when they are carried out."""

from dataclasses import replace

from cluster.codec import decode, encode
from cluster.orders import (
    DrainOrder,
    LogOrder,
    Order,
    Orders,
    RestartOrder,
    RoleOrder,
    ScaleOrder,
    SplitOrder,
    bounded,
    carried_out,
    name,
)
from cluster.pools import Member
from tests.cluster.fluid import SPEC

ALL: tuple[Order, ...] = (
    DrainOrder("a"), RoleOrder("b", "decode"), SplitOrder(1, 2), ScaleOrder(2, 5), RestartOrder(("a", "b"), 3),
    LogOrder("debug"),
)  # fmt: skip
SERVING = Member("a", "both", "serving", 1)
B, C = replace(SERVING, id="b"), replace(SERVING, id="c")


def test_all_of_them_go_over_the_wire_and_are_summed_up() -> None:
    assert tuple(decode(encode(order)) for order in ALL) == ALL
    orders = Orders.of(ALL)
    assert (orders.drain, orders.roles) == (frozenset("a"), {"b": "decode"})
    assert (orders.split, orders.scale, orders.restart, orders.log) == ALL[2:]
    assert [name(order) for order in ALL] == ["drain/a", "role/b", "split", "scale", "restart", "log"]
    assert Orders.of([]) == Orders()


def test_which_hold_roles_and_which_are_done_once() -> None:
    orders = Orders.of(ALL)
    assert orders.role_names == ("role/b", "split")
    assert orders.once == ("drain/a", "restart")
    assert (orders.lasting.once, orders.lasting.scale) == ((), orders.scale)
    assert [Orders.of([order]).hold_roles for order in ALL] == [False, True, True, False, False, False]


def test_bounds_of_size_are_the_orders_while_they_hold() -> None:
    spec = replace(SPEC, least=1, most=8)
    assert bounded(spec, Orders()) == spec
    assert bounded(spec, Orders(scale=ScaleOrder(2, 5))) == replace(spec, least=2, most=5)
    # given to an earlier deployment that had room for more
    assert bounded(spec, Orders(scale=ScaleOrder(9, 20))) == replace(spec, least=8, most=8)
    # a restart keeps as many as there were, within what is allowed
    assert bounded(spec, Orders(restart=RestartOrder(("a",), 6))).least == 6
    assert bounded(spec, Orders(restart=RestartOrder(("a",), 6), scale=ScaleOrder(2, 5))).least == 5


def test_a_drain_and_a_kept_role_are_over_with_their_worker() -> None:
    orders = Orders.of([DrainOrder("a"), DrainOrder("c"), RoleOrder("c", "prefill"), RoleOrder("b", "decode")])
    assert carried_out(SPEC, [replace(SERVING, state="draining"), B], orders) == ("drain/c", "role/c")
    assert carried_out(SPEC, [B], orders) == ("drain/a", "drain/c", "role/c")


def test_a_restart_is_over_when_the_last_replacement_serves() -> None:
    orders = Orders(restart=RestartOrder(("a", "b"), 2))
    assert carried_out(SPEC, [B, C], orders) == ()
    assert carried_out(SPEC, [C], orders) == ()
    assert carried_out(SPEC, [C, replace(SERVING, id="d", state="starting")], orders) == ()
    assert carried_out(SPEC, [C, replace(SERVING, id="d")], orders) == ("restart",)
