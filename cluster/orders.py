"""What operators order of a running deployment: a worker drained, roles kept, other bounds of size, a restart, a level.

Values only. They are kept in Redis under a name each (`cluster/order_book.py`), so a later order of the same name
replaces the earlier one. Drains and restarts are done once and are then crossed out; everything else holds until it is
withdrawn, over a restart of the controller too. What follows from them is the plan's (`cluster/ordered.py`); whether
one makes sense is checked where it is given (`router/order_rules.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.messages import Role
from cluster.pools import Member, Spec

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class DrainOrder:
    """That worker finishes what it has and is stopped."""

    worker: str


@dataclass(frozen=True, slots=True)
class RoleOrder:
    """That worker keeps that role."""

    worker: str
    role: Role


@dataclass(frozen=True, slots=True)
class SplitOrder:
    """Workers have the two roles in that proportion, however many there are."""

    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class ScaleOrder:
    """Least and most shards, instead of those of the configuration."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class RestartOrder:
    """Those workers are replaced one after the other; as many shards as there were serve before each is drained."""

    workers: tuple[str, ...]
    shards: int


@dataclass(frozen=True, slots=True)
class LogOrder:
    """Every process of the deployment logs from that level on."""

    level: Level


Order = DrainOrder | RoleOrder | SplitOrder | ScaleOrder | RestartOrder | LogOrder
SPLIT, SCALE, RESTART, LOG = "split", "scale", "restart", "log"


def name(order: Order) -> str:
    """Under which it is kept and withdrawn."""
    match order:
        case DrainOrder():
            return f"drain/{order.worker}"
        case RoleOrder():
            return f"role/{order.worker}"
        case SplitOrder():
            return SPLIT
        case ScaleOrder():
            return SCALE
        case RestartOrder():
            return RESTART
        case LogOrder():
            return LOG


@dataclass(frozen=True, slots=True)
class Orders:
    """All that hold now."""

    drain: frozenset[str] = frozenset()  # workers
    roles: Mapping[str, Role] = field(default_factory=dict)  # worker -> the role it keeps
    split: SplitOrder | None = None
    scale: ScaleOrder | None = None
    restart: RestartOrder | None = None
    log: LogOrder | None = None

    @classmethod
    def of(cls, orders: Iterable[Order]) -> Orders:
        found = cls()
        for order in orders:
            match order:
                case DrainOrder():
                    found = replace(found, drain=found.drain | {order.worker})
                case RoleOrder():
                    found = replace(found, roles={**found.roles, order.worker: order.role})
                case SplitOrder():
                    found = replace(found, split=order)
                case ScaleOrder():
                    found = replace(found, scale=order)
                case RestartOrder():
                    found = replace(found, restart=order)
                case LogOrder():
                    found = replace(found, log=order)
        return found

    @property
    def hold_roles(self) -> bool:
        """Whether roles are the operator's and not the traffic's."""
        return self.split is not None or bool(self.roles)

    @property
    def once(self) -> tuple[str, ...]:
        """The names of those that are done once."""
        return (*(f"drain/{worker}" for worker in sorted(self.drain)), *([RESTART] if self.restart else []))

    @property
    def lasting(self) -> Orders:
        """The others."""
        return replace(self, drain=frozenset(), restart=None)

    @property
    def role_names(self) -> tuple[str, ...]:
        """The names of those that hold roles."""
        return (*(f"role/{worker}" for worker in sorted(self.roles)), *([SPLIT] if self.split else []))


NONE = Orders()


def bounded(spec: Spec, orders: Orders) -> Spec:
    """The spec with the bounds of size that hold while these orders do; never more than the configuration has room for,
    which may have been another one when they were given."""
    least, most = spec.least, spec.most
    if orders.scale:
        least, most = min(orders.scale.least, spec.most), min(orders.scale.most, spec.most)
    if orders.restart:
        least = max(least, min(orders.restart.shards, most))
    return replace(spec, least=least, most=most)


def carried_out(spec: Spec, members: Sequence[Member], orders: Orders) -> tuple[str, ...]:
    """The names of the orders that nothing is left to do for. `spec` is that of the configuration."""
    there = {member.id for member in members}
    done = [f"drain/{worker}" for worker in sorted(orders.drain - there)]
    done += [f"role/{worker}" for worker in sorted(orders.roles.keys() - there)]
    if orders.restart is not None and not there & set(orders.restart.workers):
        shards = sum(member.shards for member in members if member.state == "serving")
        if shards >= bounded(spec, orders).least:
            done.append(RESTART)
    return tuple(done)
