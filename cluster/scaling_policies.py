"""How many workers are wanted. A policy is a pure function of the present and knows no past.

    slo                    as few as are predicted to keep the SLOs (the default)
    utilization[:PART]     so many that they are busy for that part of the time (0.7)
    schedule:HH:MM=N,...   N workers from that time of day (UTC) on
    fixed                  as many as there are
    module:function        `function(spec, members, demand, now) -> int | {role: int}`, see `Policy`

Patience, limits and who comes or goes are the same for all of them and are in `cluster/autoscaling.py`.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.capacity import Need, Needs, needs, serving, shards_of, used
from cluster.errors import ConfigError
from cluster.messages import Role
from cluster.pools import Demand, Member, Now, Spec

Wanted = int | Mapping[Role, int]  # workers in all, or of each role; those that drain do not count
Policy = Callable[[Spec, Sequence[Member], Demand, Now], Wanted]

MOST_BUSY = 0.85  # a pool that is busier has no room for the next second's arrivals
UTILIZATION = 0.7
MISSED_BUSY = 0.5  # an SLO that a pool less busy than this misses is not missed for want of workers
TAIL = 2.0  # mean waits that the TTFT SLO has to leave room for
SPREAD = 1.5  # (squared variation of gaps + of prompts) / 2: prompts vary more than exponential lengths do
ENTRY = re.compile(r"(\d\d?):([0-5]\d)=(\d+)")
DAY_S = 86400
EPSILON = 1e-9  # what rounding adds to a need that is a whole number


@functools.cache
def policy(name: str) -> Policy:
    """The one that the setting `autoscaling` names. Raises ConfigError that says what to write instead."""
    kind, _, argument = name.partition(":")
    if name == "slo":
        return _slo
    if name == "fixed":
        return _fixed
    if kind == "utilization":
        return _utilization(argument)
    if kind == "schedule":
        return _schedule(argument)
    if kind and argument:
        return _imported(kind, argument)
    raise ConfigError(
        f"autoscaling: unknown policy {name!r}; use slo, utilization[:PART], schedule:HH:MM=N,..., fixed, or"
        " module:function"
    )


def present(members: Sequence[Member]) -> list[Member]:
    """Those who serve or are about to."""
    return [member for member in members if member.state != "draining"]


def _fixed(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Wanted:
    return len(present(members))


def _slo(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Wanted:
    found = _needs(spec, members, demand, now)
    if found is None:
        return len(present(members))
    wanted = _workers(spec, members, found, MOST_BUSY, _shards_in_time(found, _prompts(spec, found), spec.ttft_slo_ms))
    return _one_more_where_missed(spec, members, demand, found, wanted)


def _one_more_where_missed(
    spec: Spec, members: Sequence[Member], demand: Demand, found: Needs, wanted: Mapping[Role, int]
) -> Mapping[Role, int]:
    """Predictions can be wrong: a busy pool that misses its SLO gets one more, once the last one has begun to serve."""
    missed: list[tuple[Role, float]] = []
    if demand.ttft_ms > spec.ttft_slo_ms:
        missed.append(("prefill", found.prefill.total))
    if demand.itl_ms > spec.itl_slo_ms:
        missed.append(("decode", found.decode.total))
    more = dict(wanted)
    for role, need in missed:
        role = role if spec.disaggregated and role in wanted else "both"
        there = [member for member in present(members) if member.role == role]
        need = need if role != "both" else found.prefill.total + found.decode.total
        if role in more and need > MISSED_BUSY * shards_of(there) and serving(there, role) == there:
            more[role] = max(more[role], len(there) + 1)
    return more


def _utilization(argument: str) -> Policy:
    try:
        part = float(argument or UTILIZATION)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise ConfigError(f"autoscaling: utilization:{argument} is no part of one; write for example utilization:0.7")

    def wanted(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Wanted:
        found = _needs(spec, members, demand, now)
        return len(present(members)) if found is None else _workers(spec, members, found, part)

    return wanted


def _schedule(argument: str) -> Policy:
    matches = [ENTRY.fullmatch(entry.strip()) for entry in argument.split(",")]
    times = sorted((3600 * int(m[1]) + 60 * int(m[2]), int(m[3])) for m in matches if m)
    if len(times) < len(matches) or any(at >= DAY_S for at, _ in times):
        raise ConfigError(
            f"autoscaling: schedule:{argument} is not HH:MM=N,...; write for example schedule:07:00=8,19:30=2"
        )

    def wanted(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Wanted:
        begun = [count for at, count in times if at <= now.utc_s % DAY_S]
        return begun[-1] if begun else times[-1][1]  # before the day's first, yesterday's last holds

    return wanted


def _imported(module: str, name: str) -> Policy:
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"autoscaling: cannot import {module}:{name}: {error}") from None
    if not callable(found):
        raise ConfigError(f"autoscaling: {module}:{name} is not a function(spec, members, demand, now)")
    called: Policy = found
    return called


def _needs(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Needs | None:
    """What waits will have to wait for new workers anyway: they are not sized to clear it in an instant. What a pool of
    all that serve could not take in has not come out as tokens yet, and will."""
    start_s = max((member.rates.start_s for member in members if member.rates), default=0.0)
    found = needs(spec, members, demand, now.monotonic_s, start_s)
    if found is None:
        return None
    there = shards_of(serving(members, "prefill", "decode", "both"))
    held_back = max(1.0, used(found.prefill.steady + found.decode.steady, there)) if there else 1.0
    steady = found.decode.steady * held_back
    return replace(found, decode=Need(steady, max(0.0, found.decode.total - steady)))


def _prompts(spec: Spec, found: Needs) -> float:
    """Shards that are busy where prompts are computed: those of workers that do both, with both."""
    return found.prefill.total + (0.0 if spec.disaggregated else found.decode.total)


def _shards_in_time(found: Needs, need: float, slo_ms: float) -> int:
    """As many as keep a first token within the SLO. At twice the need hardly anybody waits: what misses the SLO then
    does not miss it for want of workers."""
    shards = max(1, _ceil(need / MOST_BUSY))
    while shards <= 2 * need and _ttft_ms(found.prompt_ms, used(need, shards), shards) > slo_ms:
        shards += 1
    return shards


def _ttft_ms(prompt_ms: float, busy: float, shards: int) -> float:
    """Time to a first token when that many shards prefill: that of an M/G/n queue after Sakasegawa (1977)."""
    if busy >= 1:
        return math.inf
    wait = math.pow(busy, math.sqrt(2 * (shards + 1)) - 1) / (shards * (1 - busy))
    return prompt_ms * (1 + TAIL * SPREAD * wait)


def _workers(spec: Spec, members: Sequence[Member], found: Needs, part: float, least: int = 0) -> Mapping[Role, int]:
    """Workers of each role that are busy for that part of the time, with `least` shards for prompts at least. One that
    has both roles goes on alone as long as it is enough."""
    together = found.prefill.total + found.decode.total
    if not spec.disaggregated:
        return {"both": max(1, _ceil(max(together / part, least) / spec.shards["both"]))}
    alone = present(members)
    if len(alone) == 1 and alone[0].role == "both" and together <= part * alone[0].shards:
        return {"both": 1}
    return {
        "prefill": max(1, _ceil(max(found.prefill.total / part, least) / spec.shards["prefill"])),
        "decode": max(1, _ceil(found.decode.total / part / spec.shards["decode"])),
    }


def _ceil(value: float) -> int:
    return math.ceil(value - EPSILON)
