"""Where operators' orders are kept: one hash per namespace in Redis, name -> message.

Routers write it, the controller and every process that logs read it. It promises nothing: a Redis that lost everything
has lost the orders too, and then the configuration holds again. What the orders mean is `cluster/orders.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from cluster.codec import decode, encode
from cluster.errors import ProtocolError
from cluster.orders import Order, Orders, name
from cluster.redis import Link

TIMEOUT_S = 1.0


class OrderBook:
    """Every method raises Unavailable when Redis does not answer within a second."""

    def __init__(self, redis_url: str) -> None:
        self._link = Link(redis_url, TIMEOUT_S)

    async def read(self, namespace: str) -> Orders:
        """Raises ProtocolError for what another version wrote."""
        return _orders(namespace, await self._link.command("HGETALL", _key(namespace)))

    async def change(self, namespace: str, given: Sequence[Order], withdrawn: Sequence[str] = ()) -> Orders:
        """Withdraw the orders of these names, if there are any, and give these, each in place of the one of the same
        name; all at once. Returns what is ordered then. Raises ProtocolError for what another version wrote."""
        key = _key(namespace)
        commands: list[tuple[bytes | str, ...]] = [("HDEL", key, *withdrawn)] if withdrawn else []
        commands += [("HSET", key, name(order), encode(order)) for order in given]
        *_, found = await self._link.transaction(*commands, ("HGETALL", key))
        return _orders(namespace, found)

    async def close(self) -> None:
        await self._link.close()


def _key(namespace: str) -> str:
    return f"tandem:{{{namespace}}}:orders"


def _orders(namespace: str, found: dict[bytes, bytes]) -> Orders:
    orders = [decode(value) for value in found.values()]
    if not all(isinstance(order, get_args(Order)) for order in orders):
        raise ProtocolError(f"{_key(namespace)} holds something that is no order; is the Redis shared?")
    return Orders.of(orders)
