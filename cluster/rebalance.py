"""Which worker has which role: the split of the pools follows the mix of prompt and output tokens.

`ratio` flips workers from the pool with less to do to the one with more, as many at once as make the busier of the two
least busy. It moves only when the present split is really bad, the new one clearly better even if the demand were
misjudged by a few standard errors, and both have been so for a second; then it holds still. `cover` sees to it that
every role has somebody. `leftovers` moves away what a worker that left decoding is still decoding. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from cluster.capacity import Need, Needs, serving, shards_of, used
from cluster.messages import Role
from cluster.pools import Action, ChangeRole, Decision, Demand, Member, Memory, Migrate, Spec, Wish

BUSY = 0.7  # utilisation below which no split is worth changing, even were the demand misjudged
MARGIN = 0.15  # a new split is better by this part at least
ERRORS = 3.0  # standard errors by which either demand may be misjudged
CONFIRM_S = 1.0
LAPSE_S = 0.75  # that it may seem otherwise meanwhile: sequences that began together end together
HOLD_S = 8.5  # between two moves: a mix that changes every ten seconds can be followed
SAME_HOLD_S = 16.0  # between two in the same direction: the second must not be in the way of the way back
GROWS_S = 10.0  # that a decode pool which has more sequences every second is taken to go on so, before it has to give
WARM_S = 5.0  # after a pause prompts come first and outputs follow: their mix says nothing yet
COVER_S = 2.0  # that a role may be without anybody: a moment at the start is no emergency
REST_S = 10.0  # that sequences may go on for on a worker that has left decoding
LONGEST = 3.0  # mean outputs: the longest plausible one


def ratio(spec: Spec, members: Sequence[Member], needs: Needs | None, memory: Memory, now_s: float) -> Decision:
    """Flip as many workers as it takes. One worker of each role stays."""
    prefill, decode = serving(members, "prefill"), serving(members, "decode")
    if not spec.disaggregated or needs is None or not prefill or not decode:
        return (), replace(memory, ratio=None)
    flips, to = _better_split(needs, prefill, decode)
    last = memory.ratio
    if not flips:
        lapsed = last is None or now_s - last.seen_s > LAPSE_S
        return (), replace(memory, ratio=None if lapsed else last)
    wish = replace(last, seen_s=now_s) if last and last.what == to else Wish(to, now_s, now_s)
    hold_s = SAME_HOLD_S if to == memory.moved_to else HOLD_S
    held = memory.moved_s is not None and now_s - memory.moved_s < hold_s
    warming = memory.began_s is None or now_s - memory.began_s < WARM_S
    if held or warming or now_s - wish.since_s < CONFIRM_S:
        return (), replace(memory, ratio=wish)
    before = needs.worst(shards_of(prefill), shards_of(decode))
    note = f"{len(flips)} to {to}: the busier pool is {before:.0%} busy"
    left = {member.id: now_s for member in flips} if to == "prefill" else {}
    kept = {key: at for key, at in memory.left_decoding.items() if key not in {member.id for member in flips}}
    actions = tuple(ChangeRole(member.id, to) for member in flips)
    return actions, replace(memory, ratio=None, moved_s=now_s, moved_to=to, left_decoding=kept | left, notes=(note,))


def _better_split(
    needs: Needs, prefill: list[Member], decode: list[Member]
) -> tuple[list[Member], Literal["prefill", "decode"]]:
    """(who changes, to which role); nobody when the present split will do."""
    doubt = ERRORS * needs.noise
    to: Literal["prefill", "decode"]
    if used(needs.prefill.total, shards_of(prefill)) >= used(needs.decode.total, shards_of(decode)):
        to, busy, idle, takers, givers = "prefill", needs.prefill, needs.decode, prefill, decode
    else:
        to, busy, idle, takers, givers = "decode", needs.decode, needs.prefill, decode, prefill
    sure, feared = _judged(busy, 1 - doubt), _judged(idle, 1 + doubt)
    feared += needs.growth * GROWS_S if to == "prefill" else 0.0
    have, rest = shards_of(takers), shards_of(givers)
    if used(sure, have) <= BUSY:
        return [], to
    limit = max(used(sure, have), used(feared, rest)) * (1 - max(MARGIN, 1 / (len(takers) + len(givers))))
    best, least = 0, used(busy.total, have)
    ordered = sorted(givers, key=to_finish)
    # half of them at once: what they did not let through shows only when the other pool has become larger
    for count, member in enumerate(ordered[: len(ordered) // 2], start=1):
        have, rest = have + member.shards, rest - member.shards
        worst = max(used(busy.total, have), used(idle.total, rest))
        if worst < least and max(used(sure, have), used(feared, rest)) <= limit:
            best, least = count, worst
    return ordered[:best], to


def _judged(need: Need, factor: float) -> float:
    """What waits was counted; what arrives was sampled."""
    return need.steady * max(0.0, factor) + need.queued


def to_finish(member: Member) -> tuple[int, int, str]:
    """Least first: a prefill worker's prompts, a decode worker's context."""
    return (member.waiting_tokens + member.context_tokens, member.running, member.id)


def cover(spec: Spec, members: Sequence[Member], needs: Needs | None, memory: Memory, now_s: float) -> Decision:
    """One worker alone has both roles; of several, each role has one, and nobody has both."""
    changes = _missing(members, needs) if spec.disaggregated else ()
    if not changes:
        return (), replace(memory, cover=None)
    what = ", ".join(f"{change.id} to {change.role}" for change in changes)
    wish = memory.cover if memory.cover and memory.cover.what == what else Wish(what, now_s)
    if now_s - wish.since_s < COVER_S:
        return (), replace(memory, cover=wish)
    left = {change.id: now_s for change in changes if change.role == "prefill"}
    notes = (f"{what}: so that each role has a worker",)
    return changes, replace(memory, cover=None, left_decoding={**memory.left_decoding, **left}, notes=notes)


def _missing(members: Sequence[Member], needs: Needs | None) -> tuple[ChangeRole, ...]:
    there = serving(members, "prefill", "decode", "both")
    if len(there) == 1:
        # one that starts, perhaps again, has a role; routers do without it meanwhile
        comes = any(member.state == "starting" for member in members)
        return () if comes or there[0].role == "both" else (ChangeRole(there[0].id, "both"),)
    roles = {member.id: member.role for member in there}
    for member in sorted((m for m in there if m.role == "both"), key=to_finish):
        roles[member.id] = _shorter(there, roles, needs)
    for role in ("prefill", "decode"):
        if there and role not in roles.values():
            roles[min(there, key=to_finish).id] = role
    return tuple(ChangeRole(member.id, roles[member.id]) for member in there if roles[member.id] != member.role)


def _shorter(there: list[Member], roles: dict[str, Role], needs: Needs | None) -> Literal["prefill", "decode"]:
    """The role that nobody has, else the one with more to do per shard."""
    prefill = shards_of(member for member in there if roles[member.id] == "prefill")
    decode = shards_of(member for member in there if roles[member.id] == "decode")
    if needs is None or not (prefill and decode):
        return "prefill" if prefill < decode else "decode"
    return "prefill" if used(needs.prefill.total, prefill) > used(needs.decode.total, decode) else "decode"


def leftovers(members: Sequence[Member], demand: Demand, needs: Needs | None, memory: Memory, now_s: float) -> Decision:
    """Workers that left decoding finish what they have if that is soon, and give it away when it is not or prompts wait
    for them."""
    output = demand.output_tokens_s / demand.requests_s if demand.requests_s else 0.0
    soon = LONGEST * output * demand.itl_ms / 1000 <= REST_S
    in_the_way = needs is not None and needs.prefill.queued > 0
    actions: list[Action] = []
    left: dict[str, float] = {}
    there = {member.id: member for member in serving(members, "prefill", "decode", "both")}
    for key, at in memory.left_decoding.items():
        if key not in there or not there[key].running or now_s - at > 2 * REST_S:
            continue
        patience = REST_S if soon and not in_the_way else CONFIRM_S
        if there[key].role == "prefill" and now_s - at >= patience:  # what it says of itself is a moment old
            actions.append(Migrate(key))
        else:
            left[key] = at
    notes = (f"what {len(actions)} former decode workers still had moves on",) if actions else ()
    return tuple(actions), replace(memory, left_decoding=left, notes=notes)
