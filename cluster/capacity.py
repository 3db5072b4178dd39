"""How many shards a demand keeps busy: the one measure that the ratio and the size of the pools are decided by.

    prefill   uncached tokens per second / the tokens per second that a shard computes at the typical prompt
    decode    output tokens per second / those of a shard at the largest batch that keeps the ITL SLO and has room

Both plus what it would take for work that waits to be gone in time. Linear in the load, so halving the load halves the
need. (Rate matching as in DistServe, arXiv:2401.09670, and DOPD, arXiv:2511.20982.) Pure; knows no policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.messages import Rates, Role
from cluster.perfmodel import decode_ms, prefill_ms
from cluster.pools import Demand, Member, Spec

SETTLED_S = 5.0  # in a role, before what a worker says of its speed in it is believed
QUEUE_SHARE = 0.5  # part of the TTFT SLO that prompts may wait for without it being trouble
AHEAD_S = 3.0  # that decoding sequences are expected to go on becoming more
VARIANCE = 2.0  # of a request's tokens, over their mean squared, plus one: as for exponential lengths
NOTHING_MS = 1e-3  # no step takes less


@dataclass(frozen=True, slots=True)
class Need:
    """In shards of one role, as real numbers."""

    steady: float  # kept wholly busy by what arrives
    queued: float  # more, for what waits to be gone in time

    @property
    def total(self) -> float:
        return self.steady + self.queued


@dataclass(frozen=True, slots=True)
class Needs:
    prefill: Need
    decode: Need
    growth: float  # shards of decode more per second, as the sequences there become more
    noise: float  # standard error of the steady parts, relative to them
    prompt_ms: float  # computing one typical prompt on a shard, alone

    def worst(self, prefill_shards: float, decode_shards: float) -> float:
        """The utilisation of the busier pool; infinite for a pool of none that is needed."""
        return max(used(self.prefill.total, prefill_shards), used(self.decode.total, decode_shards))


@dataclass(frozen=True, slots=True)
class _Typical:
    """Of one request, in tokens."""

    uncached: int
    cached: int
    context: int  # of a sequence in the middle of its output


def used(need: float, shards: float) -> float:
    return need / shards if shards > 0 else (math.inf if need > 0 else 0.0)


def serving(members: Iterable[Member], *roles: Role) -> list[Member]:
    return [member for member in members if member.state == "serving" and member.role in roles]


def shards_of(members: Iterable[Member]) -> int:
    return sum(member.shards for member in members)


def noise(demand: Demand) -> float:
    """Standard error of the rates, relative to them."""
    return math.sqrt(VARIANCE / max(demand.requests, 1.0))


def needs(
    spec: Spec,
    members: Sequence[Member],
    demand: Demand,
    now_s: float,
    patience_s: float = 0.0,
    lately: tuple[float, float] | None = None,
) -> Needs | None:
    """None while no worker has said how fast it is. What waits may take the TTFT SLO and `patience_s` more; `lately`:
    (decoding sequences, more of them per second), which are counted ahead, since outputs show their length only as they
    grow; None: as many as there are now."""
    if not any(member.rates for member in members):
        return None
    typical = _typical(members, demand)
    prefillers, decoders = serving(members, "prefill", "both"), serving(members, "decode", "both")
    prefill_speed = _per_shard(members, "prefill", now_s, lambda member, rates: _prefill_speed(rates, typical))
    decode_speed = _per_shard(members, "decode", now_s, lambda member, rates: _decode(spec, member, rates, typical)[1])
    batch = _per_shard(members, "decode", now_s, lambda member, rates: _decode(spec, member, rates, typical)[0])
    waiting = demand.waiting_tokens + sum(member.waiting_tokens for member in prefillers)
    prompt_ms = 1000 * typical.uncached / prefill_speed
    in_time_s = max(spec.ttft_slo_ms, 2 * prompt_ms) / 1000 + patience_s
    running, growth = lately or (float(sum(member.running for member in decoders)), 0.0)
    growth = max(0.0, growth)
    running += growth * AHEAD_S
    prefill, decode = demand.uncached_tokens_s / prefill_speed, demand.output_tokens_s / decode_speed
    queued = waiting / prefill_speed / in_time_s - QUEUE_SHARE * shards_of(prefillers)
    return Needs(
        # a long queue says that there is too little, not how much too little: it counts as the rest does at most
        prefill=Need(prefill, min(max(0.0, queued), prefill)),
        decode=Need(decode, min(max(0.0, running / batch - decode), max(decode, float(shards_of(decoders))))),
        growth=growth / batch,
        noise=noise(demand),
        prompt_ms=prompt_ms,
    )


def _typical(members: Iterable[Member], demand: Demand) -> _Typical:
    requests = demand.requests_s or 1.0
    decoders = [member for member in serving(members, "decode", "both") if member.running]
    uncached = demand.uncached_tokens_s / requests
    prompt = max(demand.prompt_tokens_s / requests, uncached)
    if decoders:
        context = sum(member.context_tokens for member in decoders) / sum(member.running for member in decoders)
    else:
        context = prompt + demand.output_tokens_s / requests / 2
    return _Typical(max(1, round(uncached)), round(prompt - uncached), max(1, round(context)))


def _per_shard(members: Sequence[Member], role: Role, now_s: float, measure: Callable[[Member, Rates], float]) -> float:
    """Of those who have been in the role for long enough to know, else of those who are in it, else of anybody."""
    known = [(member, member.rates) for member in members if member.rates is not None]
    inside = [(member, rates) for member, rates in known if member.role in (role, "both")]
    settled = [(member, rates) for member, rates in inside if now_s - member.since_s >= SETTLED_S]
    chosen = settled or inside or known
    return sum(measure(member, rates) for member, rates in chosen) / shards_of(member for member, _ in chosen)


def _prefill_speed(rates: Rates, typical: _Typical) -> float:
    """Tokens per second of one worker."""
    return 1000 * typical.uncached / max(prefill_ms(rates, typical.uncached, typical.cached), NOTHING_MS)


def _decode(spec: Spec, member: Member, rates: Rates, typical: _Typical) -> tuple[float, float]:
    """(largest batch that keeps the ITL SLO and fits into memory, tokens per second with it) of one worker.

    An SLO that a sequence alone misses is no use for planning: it then counts as twice what that takes."""
    alone = decode_ms(rates, 1, typical.context)
    more = decode_ms(rates, 2, 2 * typical.context) - alone
    room = member.kv_tokens // typical.context if member.kv_tokens else spec.max_sequences
    batch = min(room, spec.max_sequences)
    if more > 0:
        slo_ms = spec.itl_slo_ms if spec.itl_slo_ms >= alone else 2 * alone
        batch = min(batch, int((slo_ms - alone) / more) + 1)
    batch = max(batch, 1)
    return float(batch), 1000 * batch / max(decode_ms(rates, batch, batch * typical.context), NOTHING_MS)
