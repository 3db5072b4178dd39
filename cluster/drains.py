"""Workers on their way out finish what they have, give it away if that takes long, and end when nothing is left.

Decides when; who goes out is for `cluster/autoscaling.py`. Never ends a worker that still has something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.pools import Action, Decision, Member, Memory, Migrate, Stop

SETTLE_S = 2.0  # for what was on its way when the drain began
DRAIN_S = 30.0  # for what is there to finish by itself
AGAIN_S = 10.0  # between two requests to give the rest away


def drains(members: Sequence[Member], memory: Memory, now_s: float) -> Decision:
    """A worker that cannot get rid of something is not stopped for it: requests have deadlines of their own."""
    actions: list[Action] = []
    notes: list[str] = []
    migrated: dict[str, float] = {}
    for member in (member for member in members if member.state == "draining"):
        age_s = now_s - member.since_s
        last_s = memory.migrated.get(member.id)
        if not member.running and not member.waiting_tokens:
            if age_s >= SETTLE_S:
                actions.append(Stop(member.id))
                notes.append(f"{member.id} stopped: it has nothing left after {age_s:.0f} s")
        elif age_s >= DRAIN_S and (last_s is None or now_s - last_s >= AGAIN_S):
            actions.append(Migrate(member.id))
            notes.append(f"what {member.id} still has moves on: it drains for {age_s:.0f} s")
            last_s = now_s
        if last_s is not None:
            migrated[member.id] = last_s
    return tuple(actions), replace(memory, migrated=migrated, notes=tuple(notes))
