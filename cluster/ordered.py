"""What operators' orders want done now: workers drained, roles changed. Before anything that the traffic wants.

    drain      at once; but somebody goes on serving, so the last one waits for another to come
    restart    the next of the list, when everybody serves and there are as many as before
    roles      as ordered, unless a role would be left without anybody

Whom an order does not name is the rest of the plan's. Bounds of size are in the spec (`cluster/orders.py::bounded`) and
are kept by `cluster/autoscaling.py`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.capacity import serving, shards_of
from cluster.messages import Role
from cluster.orders import Orders, SplitOrder
from cluster.pools import Action, ChangeRole, Decision, Drain, Member, Memory, Spec
from cluster.rebalance import to_finish


def ordered(spec: Spec, members: Sequence[Member], orders: Orders, memory: Memory, now_s: float) -> Decision:
    """What is ordered and not so yet. `spec` has the bounds of the orders."""
    drains = _drains(spec, members, orders)
    changes = _changes(members, orders) if spec.disaggregated and not drains else ()
    left = {change.id: now_s for change in changes if change.role == "prefill"}
    notes = ("as an operator ordered",) if drains or changes else ()
    actions: tuple[Action, ...] = drains or changes
    return actions, replace(memory, left_decoding={**memory.left_decoding, **left}, notes=notes)


def _drains(spec: Spec, members: Sequence[Member], orders: Orders) -> tuple[Drain, ...]:
    there = serving(members, "prefill", "decode", "both")
    named = {*orders.drain, *_next_to_restart(spec, members, orders)}
    chosen: list[Drain] = []
    for member in members:
        if member.id not in named or member.state == "draining":
            continue
        if member.state == "starting":
            chosen.append(Drain(member.id))
        elif len(there) > 1:
            there.remove(member)
            chosen.append(Drain(member.id))
    return tuple(chosen)


def _next_to_restart(spec: Spec, members: Sequence[Member], orders: Orders) -> tuple[str, ...]:
    """At most one, and nobody while a change is under way."""
    if orders.restart is None or shards_of(members) < spec.least:
        return ()
    if any(member.state != "serving" for member in members):
        return ()
    there = {member.id for member in members}
    return tuple(worker for worker in orders.restart.workers if worker in there)[:1]


def _changes(members: Sequence[Member], orders: Orders) -> tuple[ChangeRole, ...]:
    """Of those that serve; none that would leave a role without anybody."""
    there = serving(members, "prefill", "decode", "both")
    if len(there) < 2:
        return ()
    roles = {member.id: member.role for member in there}
    wanted = _split(there, orders.split) if orders.split else {k: v for k, v in orders.roles.items() if k in roles}
    after = {**roles, **wanted}
    if "both" not in after.values() and not {"prefill", "decode"} <= set(after.values()):
        return ()
    return tuple(ChangeRole(worker, role) for worker, role in wanted.items() if roles[worker] != role)


def _split(there: Sequence[Member], split: SplitOrder) -> dict[str, Role]:
    """Who changes to which role: those with least to finish."""
    wanted = round(len(there) * split.prefill / (split.prefill + split.decode))
    wanted = min(max(1, wanted), len(there) - 1)
    prefill = sorted((member for member in there if member.role == "prefill"), key=to_finish)
    others = sorted((member for member in there if member.role != "prefill"), key=to_finish)
    to_decode: dict[str, Role] = {member.id: "decode" for member in prefill[: max(0, len(prefill) - wanted)]}
    to_prefill: dict[str, Role] = {member.id: "prefill" for member in others[: max(0, wanted - len(prefill))]}
    return to_decode | to_prefill
