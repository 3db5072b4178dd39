"""From the number of workers there is to the number that the policy wants.

More are started once they have been wanted for a few seconds, as many at once as are missing (what is starting counts
as there). Fewer: only if they would do with a quarter more of demand, for half a minute without a break, half of what
is too many at a time, and not before the last drain has ended. Never fewer shards than `least`, never more than `most`,
and one of each role. With `least` 0, nobody when nobody has asked for anything for five minutes; the first request that
waits starts them again. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.capacity import Needs, noise, serving, shards_of
from cluster.messages import Role
from cluster.pools import Action, Decision, Demand, Drain, Member, Memory, Now, Spec, Start, Wish
from cluster.rebalance import to_finish
from cluster.scaling_policies import Wanted, policy, present

UP_S = 3.0
DOWN_S = 30.0
SPARE = 1.25  # of the demand, with which the survivors must be predicted to do
DOUBT = 1.5  # standard errors by which the demand may be misjudged, either way
IDLE_S = 300.0


def size(
    spec: Spec, members: Sequence[Member], found: Needs | None, demand: Demand, memory: Memory, now: Now
) -> Decision:
    """Start or drain workers. `found`: the present needs, by which a number of workers in all is divided into roles."""
    there = present(members)
    if not there:
        return _wake(spec, members, demand, memory)
    if spec.least == 0 and spec.policy != "fixed" and now.monotonic_s - (memory.busy_s or 0.0) >= IDLE_S:
        actions = tuple(Drain(member.id) for member in serving(there, "prefill", "decode", "both"))
        notes = (f"all {len(actions)} go: no request for {IDLE_S:.0f} s",) if actions else ()
        return actions, replace(memory, size=None, notes=notes)
    if shards_of(there) > spec.most:
        return _cut(spec, there, found, memory)
    try:
        wanted = _wanted(spec, members, found, demand, now)
    except Exception as error:  # the policy may be anybody's code: whatever is wrong with it must not stop the plan
        fault = f"autoscaling: {spec.policy} failed, the size stays: {type(error).__name__}: {error}"
        return (), replace(memory, size=None, fault=fault, notes=(fault,) if fault != memory.fault else ())
    memory = replace(memory, fault="")
    more = sum(wanted.values()) - len(there)
    if more > 0 or shards_of(there) < spec.least:
        return _grow(spec, members, wanted, memory, now.monotonic_s)
    return _shrink(spec, members, wanted, -more, memory, now.monotonic_s)


def _wake(spec: Spec, members: Sequence[Member], demand: Demand, memory: Memory) -> Decision:
    """From nothing: one of each role if they fit, else one that has both. A lost pool comes back the same way."""
    if not (demand.waiting or demand.requests_s or spec.least):
        return (), replace(memory, size=None)
    free = spec.most - shards_of(members)
    pair: tuple[Role, ...] = ("prefill", "decode") if spec.disaggregated else ("both",)
    roles = pair if sum(_shards(spec, role) for role in pair) <= free else ("both",)
    if sum(_shards(spec, role) for role in roles) > free:
        return (), replace(memory, size=None)  # those that drain hold the budget
    notes = (f"{' and '.join(roles)} started: requests wait and there is nobody",)
    return tuple(Start(role) for role in roles), replace(memory, size=None, notes=notes)


def _wanted(spec: Spec, members: Sequence[Member], found: Needs | None, demand: Demand, now: Now) -> Mapping[Role, int]:
    """More than there are if the policy wants them even for less than the demand seems to be, fewer if they will do
    even for more; else what there is."""
    decide = policy(spec.policy)
    doubt = DOUBT * noise(demand)
    there = len(present(members))
    low = _by_role(spec, members, found, decide(spec, members, _times(demand, max(0.0, 1 - doubt)), now))
    if sum(low.values()) > there:
        return low
    high = _by_role(spec, members, found, decide(spec, members, _times(demand, max(SPARE, 1 + doubt)), now))
    return high if sum(high.values()) < there else _have(members)


def _times(demand: Demand, factor: float) -> Demand:
    """Of what arrives; what waits was counted."""
    return replace(
        demand,
        requests_s=factor * demand.requests_s,
        uncached_tokens_s=factor * demand.uncached_tokens_s,
        output_tokens_s=factor * demand.output_tokens_s,
        prompt_tokens_s=factor * demand.prompt_tokens_s,
    )


def _by_role(spec: Spec, members: Sequence[Member], found: Needs | None, wanted: Wanted) -> dict[Role, int]:
    """Raises ValueError for what is no answer. Nobody at all is for idleness to decide."""
    roles: tuple[Role, ...] = ("prefill", "decode", "both")
    if isinstance(wanted, Mapping):
        if unknown := wanted.keys() - set(roles):
            raise ValueError(f"it answered with roles {sorted(unknown)}; there are {', '.join(roles)}")
        counts = {role: int(wanted[role]) for role in roles if role in wanted}
        return counts if sum(counts.values()) > 0 and min(counts.values()) >= 0 else {"both": 1}
    if not isinstance(wanted, int):
        raise ValueError(f"it answered {wanted!r}; an int or a mapping from role to int is wanted")
    if not spec.disaggregated or wanted <= 1:
        return {"both": max(1, wanted)}
    have = _have(members)
    prefill, decode = float(have.get("prefill", 1)), float(have.get("decode", 1))
    if found is not None and found.prefill.total + found.decode.total > 0:
        prefill, decode = found.prefill.total / _shards(spec, "prefill"), found.decode.total / _shards(spec, "decode")
    first = min(max(1, round(wanted * prefill / (prefill + decode))), wanted - 1)
    return {"prefill": first, "decode": wanted - first}


def _grow(spec: Spec, members: Sequence[Member], wanted: Mapping[Role, int], memory: Memory, now_s: float) -> Decision:
    wish = memory.size if memory.size and memory.size.what == "grow" else Wish("grow", now_s)
    if now_s - wish.since_s < UP_S:
        return (), replace(memory, size=wish)
    have = _have(members)
    held, room = shards_of(present(members)), spec.most - shards_of(members)
    roles: tuple[Role, ...] = ("prefill", "decode") if spec.disaggregated else ("both",)
    starts: list[Start] = []
    while sum(have.values()) < sum(wanted.values()) or held < spec.least:
        # of equals, the role with fewer workers
        role = max(roles, key=lambda r: (wanted.get(r, 0) - have.get(r, 0), -have.get(r, 0)))
        if _shards(spec, role) > room:
            break
        starts.append(Start(role))
        have[role] = have.get(role, 0) + 1
        held, room = held + _shards(spec, role), room - _shards(spec, role)
    if not starts:
        return (), replace(memory, size=wish)  # the budget is used up
    notes = (f"{_words(starts)} started: {sum(wanted.values())} workers wanted",)
    return tuple(starts), replace(memory, size=None, notes=notes)


def _shrink(
    spec: Spec, members: Sequence[Member], wanted: Mapping[Role, int], surplus: int, memory: Memory, now_s: float
) -> Decision:
    if surplus <= 0 or any(member.state != "serving" for member in members):
        return (), replace(memory, size=None)
    wish = memory.size if memory.size and memory.size.what == "shrink" else Wish("shrink", now_s)
    if now_s - wish.since_s < DOWN_S:
        return (), replace(memory, size=wish)
    left, chosen = list(members), list[Member]()
    while len(chosen) < (surplus + 1) // 2 and (member := _least_missed(spec, left, wanted)) is not None:
        left.remove(member)
        chosen.append(member)
    if not chosen:
        return (), replace(memory, size=wish)
    notes = (f"{', '.join(member.id for member in chosen)} drained: {sum(wanted.values())} workers will do",)
    actions: tuple[Action, ...] = tuple(Drain(member.id) for member in chosen)
    return actions, replace(memory, size=None, notes=notes)


def _cut(spec: Spec, there: list[Member], found: Needs | None, memory: Memory) -> Decision:
    """An operator allows fewer shards than there are: at once, and whatever the policy wants."""
    left, chosen = list(there), list[Member]()
    while shards_of(left) > spec.most:
        member = _least_missed(spec, left, _by_role(spec, left, found, len(left) - 1))
        if member is None:
            break
        left.remove(member)
        chosen.append(member)
    notes = (f"{', '.join(member.id for member in chosen)} drained: {spec.most} shards are allowed",) if chosen else ()
    return tuple(Drain(member.id) for member in chosen), replace(memory, size=None, notes=notes)


def _least_missed(spec: Spec, left: list[Member], wanted: Mapping[Role, int]) -> Member | None:
    """Of the role with the most workers too many: who has the least to finish, of equals who came last, for whom a node
    was perhaps rented. Nobody if `least` does not allow it."""
    have = _have(left)
    alone = sum(wanted.values()) == 1  # then the last worker has both roles
    for role in sorted(have, key=lambda r: wanted.get(r, 0) - have[r]):
        if have[role] == 1 and spec.disaggregated and not alone:
            continue
        candidates = (member for member in left if member.role == role)
        member = min(candidates, key=lambda m: (*to_finish(m)[:2], -m.since_s, m.id))  # of equals, the newest
        if shards_of(left) - member.shards >= max(spec.least, 1):
            return member
    return None


def _have(members: Sequence[Member]) -> dict[Role, int]:
    have: dict[Role, int] = {}
    for member in present(members):
        have[member.role] = have.get(member.role, 0) + 1
    return have


def _shards(spec: Spec, role: Role) -> int:
    """A worker that has both roles in a disaggregated deployment is made as a decode worker is."""
    return spec.shards.get(role, spec.shards.get("decode", 1))


def _words(starts: Sequence[Start]) -> str:
    roles = [start.role for start in starts]
    return ", ".join(f"{roles.count(role)} {role}" for role in sorted(set(roles)))
