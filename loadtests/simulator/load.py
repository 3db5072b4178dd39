"""How busy a trace keeps a fleet, and the same trace in as many copies and as fast as keep it busy to a given share.

Busy is meant of the scarcer pool: its predicted work over the time it has. Prefixes are hit as in one cache of the size
of all; decodes go in the largest batch that stays within the ITL SLO and the KV there is room for. A prediction: what a
run really kept busy is among its figures.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.messages import Rates
from cluster.perfmodel import prefill_ms
from loadtests.simulator.hardware import Speed
from loadtests.simulator.search import DECODE_BUSY, matched
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.trace import Trace, TraceRequest
from loadtests.simulator.traffic import traffic

ROUNDS = 4  # until the number of copies and what they find cached agree


@dataclass(frozen=True, slots=True)
class Work:
    """Workers that a trace keeps busy all the time, at its own rate."""

    prefill: float
    decode: float

    def busy(self, settings: SimSettings) -> float:
        """The share of the scarcer pool's time."""
        if not settings.prefillers:
            return (self.prefill + self.decode) / settings.workers
        decoders = settings.workers - settings.prefillers
        return max(self.prefill / settings.prefillers, self.decode / decoders)

    def split(self, workers: int) -> int:
        """How many of them should prefill for both pools to be as busy."""
        if workers == 1:
            return 0
        return min(range(1, workers), key=lambda n: max(self.prefill / n, self.decode / (workers - n)))


def work(trace: Trace, settings: SimSettings, copies: float = 1.0) -> Work:
    """Of one copy, when so many share the caches. Raises ConfigError when no number of such workers could serve it."""
    speeds = [Speed(settings.rates_of(role), settings.kv_tokens, settings.kv_bytes) for role in ("prefill", "decode")]
    asked = traffic(trace)
    found = matched(asked, speeds[0], speeds[1], settings.itl_slo_ms)
    if found is None:
        raise ConfigError(
            f"no worker holds this trace's longest request in {settings.kv_tokens} tokens of KV or decodes within"
            f" {settings.itl_slo_ms:.0f} ms; take larger workers or an easier SLO"
        )
    nodes = -(-settings.workers // settings.workers_per_node)
    room = (settings.prefillers or settings.workers) * settings.kv_tokens + nodes * settings.store_tokens
    prompts_ms = _prompts_ms(trace, settings.rates, int(room / settings.block_size / copies))
    return Work(prompts_ms / 1000 / (trace.seconds or 1.0), DECODE_BUSY * found[1])


def copies_for(load: float, trace: Trace, settings: SimSettings) -> float:
    """How many copies of the trace keep the workers that busy: the more there are, the less each finds cached."""
    copies = 1.0
    for _ in range(ROUNDS):
        copies = load / work(trace, settings, copies).busy(settings)
    return copies


def _prompts_ms(trace: Trace, rates: Rates, capacity: int) -> float:
    """Computing all prompts, with one cache of so many blocks that evicts the least recently used."""
    order: OrderedDict[int, None] = OrderedDict()
    size, total = trace.block_size, 0.0
    for r in trace.requests:
        full = r.blocks[: r.prompt_tokens // size]
        cached = min(
            next((n for n, block in enumerate(full) if block not in order), len(full)) * size, r.prompt_tokens - 1
        )
        total += prefill_ms(rates, r.prompt_tokens - cached, cached)
        for block in reversed(full + r.output_blocks):  # tails go before heads
            order[block] = None
            order.move_to_end(block)
        while len(order) > capacity:
            order.popitem(last=False)
    return total


def scaled(trace: Trace, copies: int, faster: float, seed: int) -> Iterator[TraceRequest]:
    """`copies` of the trace over one another and the whole `faster` times as fast, in the order of their arrival.

    As `transform.superpose` does it: each copy begins at a random point of the trace and goes round, with block ids and
    a tenant of its own, so reuse within a copy stays what it was. But only one request of each copy is made at a time,
    for thousands of workers need millions. Where sessions wait for answers, `superpose` keeps them together.
    """
    rng = random.Random(seed)
    span = trace.seconds + 1 / (trace.rate or 1.0)
    ids = 1 + max((max(r.blocks + r.output_blocks, default=0) for r in trace.requests), default=0)
    shifts = [rng.uniform(0, span) if copy else 0.0 for copy in range(copies)]
    parts = (_copy(trace, copy, shift, span, ids, faster) for copy, shift in enumerate(shifts))
    return heapq.merge(*parts, key=lambda r: r.arrival_s)


def _copy(trace: Trace, copy: int, shift: float, span: float, ids: int, faster: float) -> Iterator[TraceRequest]:
    """From the first request that comes after the shift has gone round the end."""
    requests = trace.requests
    first = next((n for n, r in enumerate(requests) if r.arrival_s + shift >= span), len(requests))
    for r in (*requests[first:], *requests[:first]):
        arrival_s = (r.arrival_s + shift) % span / faster
        if not copy:
            yield r._replace(arrival_s=arrival_s)
            continue
        yield TraceRequest(
            arrival_s,
            r.prompt_tokens,
            r.output_tokens,
            tuple([block + copy * ids for block in r.blocks]),
            tenant=f"{r.tenant}#{copy}",
            priority=r.priority,
            output_blocks=tuple([block + copy * ids for block in r.output_blocks]),
        )
