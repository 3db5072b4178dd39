"""Another trace out of a trace: shorter, faster, in larger numbers, or with smaller prompts; pure functions.

Each keeps what makes the trace worth replaying. None stretches time without saying so: where prefixes are reused after
minutes, a trace that runs twice as fast needs half the cache for the same hits, so prefer `superpose` to `faster`.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import groupby

from cluster.errors import ConfigError
from loadtests.simulator.trace import Trace, TraceRequest


def limit(trace: Trace, requests: int) -> Trace:
    """The first so many requests."""
    return replace(trace, requests=trace.requests[:requests])


def head(trace: Trace, seconds: float) -> Trace:
    """What arrives in the first so many seconds."""
    return replace(trace, requests=tuple(r for r in trace.requests if r.arrival_s < seconds))


def faster(trace: Trace, factor: float) -> Trace:
    """So many times the rate, by compressing time; thinking takes as long as before."""
    if factor <= 0:
        raise ConfigError(f"a trace cannot be replayed {factor} times as fast; the factor is above 0")
    return replace(trace, requests=tuple(r._replace(arrival_s=r.arrival_s / factor) for r in trace.requests))


def resized(trace: Trace, block_size: int, output_scale: float = 1.0) -> Trace:
    """The same prefix structure with blocks of another size: prompts are that many times as long or short.

    What shared n blocks still shares n. So a trace of long prompts can be replayed on a small model.
    """
    scale = block_size / trace.block_size

    def scaled(r: TraceRequest) -> TraceRequest:
        whole = (len(r.blocks) - 1) * block_size
        last = max(1, min(block_size, round(r.prompt_tokens * scale) - whole))
        output = max(1, round(r.output_tokens * output_scale))
        # with another ratio of output to prompt the output fills other blocks, which have no names
        named = r.output_blocks if output_scale == scale else ()
        return r._replace(prompt_tokens=whole + last, output_tokens=output, output_blocks=named)

    return Trace(trace.name, block_size, tuple(scaled(r) for r in trace.requests))


def superpose(trace: Trace, copies: int, seed: int = 0, seconds: float = math.inf) -> Trace:
    """The trace that many times over itself: the rate of `copies` populations that have nothing in common. Only what
    arrives in the first so many seconds.

    Each copy begins at a random point of the trace and goes round, and has block ids, sessions and a tenant of its own:
    reuse within a copy, and so the hit ratio, stay what they were. Independent copies smooth bursts out, by about
    1 / copies. Sessions move as a whole.
    """
    rng = random.Random(seed)
    ids = 1 + max((max(r.blocks + r.output_blocks, default=0) for r in trace.requests), default=0)
    sessions = 1 + max((r.session for r in trace.requests), default=-1)
    began = _session_starts(trace)
    span = _span(trace, began)
    requests: list[TraceRequest] = []
    for copy in range(copies):
        shift = rng.uniform(0, span) if copy else 0.0
        for r in trace.requests:
            start = began.get(r.session, r.arrival_s)
            arrival_s = (start + shift) % span + (r.arrival_s - start)
            if arrival_s >= seconds:
                continue
            requests.append(
                r._replace(
                    arrival_s=arrival_s,
                    blocks=tuple(b + copy * ids for b in r.blocks),
                    output_blocks=tuple(b + copy * ids for b in r.output_blocks),
                    session=r.session + copy * sessions if r.session >= 0 else r.session,
                    tenant=f"{r.tenant}#{copy}",
                )
            )
    requests.sort(key=lambda r: r.arrival_s)
    return replace(trace, requests=tuple(requests))


def at_rate(trace: Trace, rate: float, seconds: float, seed: int = 0) -> Trace:
    """So many requests a second for so long: enough copies, slowed down a little to the exact rate."""
    alone = len(trace.requests) / _span(trace, _session_starts(trace))
    copies = math.ceil(rate / alone)
    factor = rate / (copies * alone)
    return head(faster(superpose(trace, copies, seed, seconds * factor), factor), seconds)


def _span(trace: Trace, began: dict[int, float]) -> float:
    """The seconds in which requests and sessions begin, with the gap to the next."""
    starts = [r.arrival_s for r in trace.requests if r.session < 0] + list(began.values())
    return max(1e-3, max(starts, default=0.0) * (1 + 1 / max(1, len(starts))))


def _session_starts(trace: Trace) -> dict[int, float]:
    """session -> arrival of its first turn."""
    with_session = sorted((r for r in trace.requests if r.session >= 0), key=lambda r: (r.session, r.turn))
    return {session: next(turns).arrival_s for session, turns in groupby(with_session, key=lambda r: r.session)}
