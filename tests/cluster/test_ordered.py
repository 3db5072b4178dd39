"""What the plan does about operators' orders, and what it leaves alone while they hold."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.messages import Role
from cluster.orders import Orders, RestartOrder, ScaleOrder, SplitOrder
from cluster.plan import Action, ChangeRole, Demand, Drain, Member, Memory, Start, plan
from tests.cluster.fluid import RATES, SPEC, Fluid, mix, roles

FIXED = replace(SPEC, least=1, most=8)


def member(name: str, role: Role = "decode", **fields: object) -> Member:
    return replace(Member(name, role, "serving", 1, rates=RATES, since_s=-100.0), **fields)


PAIR = [member("p", "prefill"), member("d")]
FOUR = [member("p", "prefill"), member("d1"), member("d2", context_tokens=9), member("d3", context_tokens=5)]


def planned(
    members: Sequence[Member], orders: Orders, seconds: float = 0.0, spec: object = FIXED
) -> tuple[Action, ...]:
    """What the plan wants first within that time."""
    memory = Memory()
    for tick in range(int(2 * seconds) + 1):
        actions, memory = plan(spec, members, Demand(), memory, tick / 2, orders=orders)  # type: ignore[arg-type]
        if actions:
            return actions
    return ()


def test_without_orders_nothing_happens() -> None:
    assert planned(FOUR, Orders(), 20) == ()


def test_a_drain_is_done_at_once_and_once() -> None:
    orders = Orders(drain=frozenset(["d1"]))
    assert planned(FOUR, orders) == (Drain("d1"),)
    assert (
        planned([member("p", "prefill"), member("d1", state="draining", running=1, since_s=0.0), FOUR[2]], orders, 5)
        == ()
    )


def test_one_that_starts_can_be_drained() -> None:
    assert planned([*PAIR, member("w", state="starting")], Orders(drain=frozenset("w"))) == (Drain("w"),)


def test_the_last_one_that_serves_goes_on() -> None:
    orders = Orders(drain=frozenset(["p", "d"]))
    assert planned(PAIR, orders) == (Drain("p"),)
    alone = [member("p", "prefill", state="draining", running=1, since_s=0.0), member("d", "both")]
    assert planned(alone, orders, 5) == ()
    assert planned([*alone, member("w", "both")], orders) == (Drain("d"),)


@pytest.mark.parametrize(("split", "expected"), [((3, 1), {"d1", "d3"}), ((2, 2), {"d1"}), ((1, 3), set())])
def test_a_split_is_made_by_those_with_least_to_finish(split: tuple[int, int], expected: set[str]) -> None:
    actions = planned(FOUR, Orders(split=SplitOrder(*split)))
    assert {action.id for action in actions if isinstance(action, ChangeRole)} == expected
    assert all(isinstance(action, ChangeRole) and action.role == "prefill" for action in actions)


def test_a_split_keeps_its_proportion_and_one_of_each_role() -> None:
    assert planned(PAIR, Orders(split=SplitOrder(1, 7)), 5) == ()
    eight = [member(f"d{number}") for number in range(7)] + [member("p", "prefill")]
    assert len(planned(eight, Orders(split=SplitOrder(2, 2)))) == 3


def test_a_role_is_kept_unless_nobody_would_be_left_for_the_other() -> None:
    assert planned(FOUR, Orders(roles={"d2": "prefill"})) == (ChangeRole("d2", "prefill"),)
    assert planned(FOUR, Orders(roles={"p": "decode"}), 5) == ()
    assert planned(FOUR, Orders(roles={"p": "decode", "d1": "prefill"})) == (
        ChangeRole("p", "decode"),
        ChangeRole("d1", "prefill"),
    )
    assert planned(FOUR, Orders(roles={"gone": "prefill"}), 5) == ()


def test_while_roles_are_ordered_the_traffic_moves_none() -> None:
    """The same traffic moves them as soon as they are not."""
    fluid = Fluid(SPEC, roles(4, 4), lambda now: mix(5.5, 0.5))
    held = Orders(split=SplitOrder(4, 4))
    members = [worker.member() for worker in fluid.workers]
    demand = Demand(requests_s=20, uncached_tokens_s=25_000, output_tokens_s=500, prompt_tokens_s=25_000, requests=600)

    def moves(orders: Orders) -> list[Action]:
        memory, found = Memory(), list[Action]()
        for tick in range(60):
            actions, memory = plan(SPEC, members, demand, memory, tick / 2, orders=orders)
            found += [action for action in actions if isinstance(action, ChangeRole)]
        return found

    assert moves(held) == []
    assert moves(Orders()) != []


def test_more_are_started_and_fewer_drained_as_ordered() -> None:
    assert planned(PAIR, Orders(scale=ScaleOrder(4, 4)), 10) == (Start("prefill"), Start("decode"))
    actions = planned(FOUR, Orders(scale=ScaleOrder(1, 2)))
    assert len(actions) == 2
    assert all(isinstance(action, Drain) and action.id != "p" for action in actions)
    assert planned(FOUR, Orders(scale=ScaleOrder(1, 4)), 40) == ()


def test_the_role_that_is_missing_is_started() -> None:
    three = [member("p1", "prefill"), member("p2", "prefill"), member("d")]
    assert planned(three, Orders(scale=ScaleOrder(4, 4)), 10) == (Start("decode"),)


def test_a_restart_goes_on_only_when_all_are_back() -> None:
    orders = Orders(restart=RestartOrder(("p", "d1"), 4))
    assert planned(FOUR, orders) == (Drain("p"),)
    draining = [replace(FOUR[0], state="draining", running=1, since_s=0.0), *FOUR[1:]]
    assert planned(draining, orders) == ()
    gone = [member("q", "prefill"), *FOUR[2:]]
    assert planned(gone, orders, 10) == (Start("prefill"),)
    comes = [member("q", "prefill"), member("w", state="starting"), *FOUR[2:]]
    assert planned(comes, orders, 5) == ()
    assert planned([member("w", "prefill"), *FOUR[1:]], orders) == (Drain("d1"),)
    assert planned([member("w", "prefill"), member("x"), *FOUR[2:]], orders, 5) == ()


def test_a_load_that_is_ordered_away_is_lost_by_nobody() -> None:
    """Fluids under load: bounds change while requests come, and all of them end."""
    fluid = Fluid(replace(SPEC, policy="slo", least=2, most=6), roles(3, 3), lambda now: mix(0.5, 0.5))
    fluid.run(20)
    fluid.spec = replace(fluid.spec, least=2, most=2)
    fluid.run(22)
    assert sum(worker.state != "draining" for worker in fluid.workers) == 2
    fluid.run(80)
    assert len(fluid.workers) == 2
    assert fluid.arrived - fluid.finished < 60
