"""Which orders make sense: what is refused, and with what advice."""

import re

import pytest

from cluster.config import Config
from cluster.errors import InvalidRequest
from cluster.orders import DrainOrder, Orders, RestartOrder, RoleOrder, ScaleOrder, SplitOrder
from router import order_rules
from router.order_rules import Serving

PAIR = [Serving("p", "prefill", 1), Serving("d", "decode", 1)]
FOUR = [*PAIR, Serving("d2", "decode", 1), Serving("d3", "decode", 1)]
CONFIG = Config(prefill=1, decode=3, scale="2..6")
AGGREGATED = Config(prefill=0, decode=2)


def refused(words: str) -> object:
    return pytest.raises(InvalidRequest, match=re.escape(words))


def test_a_drain() -> None:
    assert order_rules.drain("d", PAIR, Orders()) == DrainOrder("d")
    with refused("no worker 'x' serves; there are d, p"):
        order_rules.drain("x", PAIR, Orders())
    with refused("d is the last worker"):
        order_rules.drain("d", PAIR[1:], Orders())
    with refused("d is the last worker"):
        order_rules.drain("d", PAIR, Orders(frozenset("p")))


def test_roles_of_workers() -> None:
    assert order_rules.roles({"d2": "prefill"}, FOUR, Orders(), CONFIG) == (RoleOrder("d2", "prefill"),)
    swapped = order_rules.roles({"p": "decode", "d": "prefill"}, PAIR, Orders(), CONFIG)
    assert swapped == (RoleOrder("p", "decode"), RoleOrder("d", "prefill"))
    with refused("nobody would be left for prefill"):
        order_rules.roles({"p": "decode"}, FOUR, Orders(), CONFIG)
    with refused("nobody would be left for decode"):
        order_rules.roles({"d": "prefill"}, PAIR, Orders(roles={"p": "prefill"}), CONFIG)
    with refused("no worker 'x'"):
        order_rules.roles({"x": "decode"}, FOUR, Orders(), CONFIG)
    with refused("start it with --prefill 1"):
        order_rules.roles({"p": "decode"}, FOUR, Orders(), AGGREGATED)


def test_a_split() -> None:
    assert order_rules.split(2, 2, FOUR, CONFIG) == SplitOrder(2, 2)
    with refused("there are 4 workers, not 5"):
        order_rules.split(2, 3, FOUR, CONFIG)
    with refused("each role needs a worker"):
        order_rules.split(0, 4, FOUR, CONFIG)


def test_bounds_of_size() -> None:
    assert order_rules.scale(2, 6, CONFIG) == ScaleOrder(2, 6)
    assert order_rules.scale(1, 1, CONFIG) == ScaleOrder(1, 1)
    for least, most in ((3, 2), (0, 2), (0, 0)):
        with refused("are no bounds"):
            order_rules.scale(least, most, CONFIG)
    with refused("7 shards are more than this deployment may have, 6; start it with --scale MIN..7"):
        order_rules.scale(2, 7, CONFIG)
    # to nothing only where requests wait for a worker then
    assert order_rules.scale(0, 2, Config(scale="0..2")) == ScaleOrder(0, 2)
    with refused("a worker has 2 shards"):
        order_rules.scale(1, 1, Config(prefill_tp=2, decode_pp=2))


def test_a_restart() -> None:
    assert order_rules.restart([], PAIR, Orders()) == RestartOrder(("d", "p"), 2)
    assert order_rules.restart(["p"], PAIR, Orders()) == RestartOrder(("p",), 2)
    with refused("no worker 'x'"):
        order_rules.restart(["x"], PAIR, Orders())
    with refused("the only worker"):
        order_rules.restart([], PAIR[:1], Orders())
    with refused("a restart is under way"):
        order_rules.restart([], PAIR, Orders(restart=RestartOrder(("p",), 2)))
