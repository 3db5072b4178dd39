"""What to do about the pools now: a pure function of what is asked for, who is there and what clients demand.

    drains, leftovers   who is on the way out, or out of decoding: Migrate, Stop
    ordered             what operators ordered (`cluster/ordered.py`)
    cover               every role has somebody; one worker alone has both
    ratio               roles follow the mix of prompt and output tokens (`cluster/rebalance.py`)
    size                as many workers as the policy wants (`cluster/autoscaling.py`)

The first of the last four that has something to do decides; while an operator keeps roles, the ratio is left alone. No
clock, no Ray, and no state but `Memory`, which comes in and goes out: the controller and the simulator call the same
function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.autoscaling import size
from cluster.capacity import needs, serving
from cluster.drains import drains
from cluster.ordered import ordered
from cluster.orders import NONE, Orders, bounded
from cluster.pools import (
    Action,
    ChangeRole,
    Decision,
    Demand,
    Drain,
    Member,
    Memory,
    Migrate,
    Now,
    Spec,
    Start,
    Stop,
)
from cluster.rebalance import cover, leftovers, ratio

__all__ = ["Action", "ChangeRole", "Decision", "Demand", "Drain", "Member", "Memory", "Migrate", "Spec", "Start",
           "Stop", "explain", "plan"]  # fmt: skip

TREND_S = 2.0  # over which the number of decoding sequences is watched


def plan(
    spec: Spec,
    members: Sequence[Member],
    demand: Demand,
    memory: Memory,
    now_s: float,
    utc_s: float = 0.0,
    orders: Orders = NONE,
) -> Decision:
    """(actions in the order in which they are to be done, memory for the next call). To be called about twice a second.
    `utc_s`: seconds since midnight UTC, for schedules."""
    spec = bounded(spec, orders)
    memory = _noticed(members, demand, memory, now_s)
    found = needs(spec, members, demand, now_s, lately=_lately(memory))
    ended, memory = drains(members, memory, now_s)
    notes = memory.notes
    moved, memory = leftovers(members, demand, found, memory, now_s)
    notes += memory.notes
    memory = replace(memory, notes=())
    actions, memory = ordered(spec, members, orders, memory, now_s)
    if not actions:
        actions, memory = cover(spec, members, found, memory, now_s)
    if orders.hold_roles:
        memory = replace(memory, ratio=None)
    elif not actions:
        actions, memory = ratio(spec, members, found, memory, now_s)
    if not actions:
        actions, memory = size(spec, members, found, demand, memory, Now(now_s, utc_s))
    return ended + moved + actions, replace(memory, notes=notes + memory.notes)


def _noticed(members: Sequence[Member], demand: Demand, memory: Memory, now_s: float) -> Memory:
    """The memory with what there is to see now."""
    asked = bool(demand.requests_s or demand.waiting or any(member.running for member in members))
    began_s = memory.began_s if memory.began_s is not None else now_s
    decoders = serving(members, "decode", "both")
    names = frozenset(member.id for member in decoders)
    known = memory.decoding if names == memory.decoders else ()  # others have others' sequences: that is no growth
    return replace(
        memory,
        began_s=began_s if asked else None,
        busy_s=now_s if asked or memory.busy_s is None else memory.busy_s,
        decoding=(
            *(entry for entry in known if now_s - entry[0] <= TREND_S),
            (now_s, sum(member.running for member in decoders)),
        ),
        decoders=names,
    )


def _lately(memory: Memory) -> tuple[float, float]:
    """(mean number of sequences that decode, by how many they become more per second). The mean, because batches that
    began together end together."""
    (first_s, first), (last_s, last) = memory.decoding[0], memory.decoding[-1]
    growth = (last - first) / (last_s - first_s) if last_s - first_s >= TREND_S / 2 else 0.0
    return sum(count for _, count in memory.decoding) / len(memory.decoding), growth


def explain(memory: Memory) -> str:
    """What the call that returned this memory decided and why, in short; empty: nothing."""
    return "; ".join(memory.notes)
