"""How workers are chosen from what they cost: the policy that counts milliseconds, and others to compare it with.

A policy takes the costs of one prompt and who may serve it, and returns rows: (prefill or None, decode), and what finds
the best other pair where it knows of others. Only `least_time` weighs both halves together, and lets the decode worker
compute the prompt although there are prefill workers; the others choose each half by their rule. Pure but for the
random numbers that two of them draw; ties go to the smaller id.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from router.costs import Costs
from router.table import FleetTable, Floats, Ints

CANDIDATES = 4  # prefill workers, the best for the prompt alone, that are paired with every decode worker
LIKE_MS = 1.0  # costs that differ by less are as good as equal
LIKE_PART = 0.05  # ... or by this part of the least time to a first token: predictions are not that good

Pair = tuple[int | None, int]  # rows of the table: prefill, decode


class Eligible(NamedTuple):
    """Rows that may serve. Without any for prefill, who decodes computes the prompt, too."""

    prefill: Ints
    decode: Ints


RunnerUp = Callable[[], Pair | None]
Policy = Callable[[Costs, Eligible, random.Random], tuple[Pair, RunnerUp | None]]


def least_time(costs: Costs, eligible: Eligible, _: random.Random) -> tuple[Pair, RunnerUp | None]:
    """The least sum of everybody's waiting. Of workers that are as good as equal the one not used for longest: cold
    prompts spread, and so do those that share no more than their first blocks."""
    prompt, table, decode = costs.prompt, costs.table, eligible.decode
    like = max(LIKE_MS, LIKE_PART * prompt.item(prompt.argmin()))
    output = costs.output[decode]
    alone = prompt[decode] + output + costs.interference[decode]
    prefill = _candidates(prompt, eligible.prefill, table, like)
    totals = prompt[prefill][:, None] + costs.handoff(prefill, decode) + output  # [candidates, decode]
    least = alone.item(alone.argmin())
    least_pair = totals.item(totals.argmin()) if prefill.size else np.inf
    if least_pair < least:
        # the first candidate that is as good is the one used least recently
        candidate = int((totals <= least_pair + like).argmax()) // decode.size
        at = int(totals[candidate].argmin())
        totals[candidate, at] = np.inf
        chosen: Pair = int(prefill[candidate]), int(decode[at])
    else:
        equal = (alone <= least + like).nonzero()[0]
        at = int(equal[table.last_used(decode[equal]).argmin()])
        alone[at] = np.inf
        chosen = None, int(decode[at])
    return chosen, partial(_least, alone, totals, prefill, decode)


def _candidates(prompt: Floats, rows: Ints, table: FleetTable, like: float) -> Ints:
    """The best of these prefill workers, those used least recently first."""
    if rows.size > CANDIDATES:
        times = prompt[rows]
        equal = rows[times <= times.item(times.argmin()) + like]
        # stable: many times are equal, which takes the other kinds of sorting, and partitioning, ten times as long
        rows = equal if equal.size >= CANDIDATES else rows[times.argsort(kind="stable")[:CANDIDATES]]
    return rows[table.last_used(rows).argsort()[:CANDIDATES]]


def _least(alone: Floats, totals: Floats, prefill: Ints, decode: Ints) -> Pair | None:
    """Of what is left; None: nothing is."""
    best = int(alone.argmin())
    if prefill.size:
        candidate, other = divmod(int(totals.argmin()), decode.size)
        if totals[candidate, other] < alone[best]:
            return int(prefill[candidate]), int(decode[other])
    return (None, int(decode[best])) if alone[best] < np.inf else None


# ---------------------------------------------------------------------------------------------- for comparison
def _each(pick: Callable[[Costs, Ints, random.Random], int]) -> Policy:
    """The policy that picks both workers by one rule, each without regard to the other."""

    def policy(costs: Costs, eligible: Eligible, rng: random.Random) -> tuple[Pair, RunnerUp | None]:
        first = pick(costs, eligible.prefill, rng) if eligible.prefill.size else None
        return (first, pick(costs, eligible.decode, rng)), None

    return policy


def _in_turn(costs: Costs, rows: Ints, _: random.Random) -> int:
    return int(rows[costs.table.last_used(rows).argmin()])


def _at_random(_: Costs, rows: Ints, rng: random.Random) -> int:
    return int(rows[rng.randrange(rows.size)])


def _least_loaded(costs: Costs, rows: Ints, _: random.Random) -> int:
    """Fewest milliseconds queued, then fewest sequences."""
    queue, batch = costs.table.queue_ms[rows], costs.table.batch[rows]
    return int(rows[np.lexsort((rows, batch, queue))[0]])


def _longest_prefix(costs: Costs, rows: Ints, rng: random.Random) -> int:
    """Whoever has most of the prompt on its device, however long the queue there: what least_time must not become."""
    device = costs.device[rows]
    return _least_loaded(costs, rows[device == device.max()], rng)


def _better_of_two(costs: Costs, rows: Ints, rng: random.Random) -> int:
    """Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001)."""
    if rows.size < 2:
        return int(rows[0])
    return _least_loaded(costs, rows[sorted(rng.sample(range(rows.size), 2))], rng)


POLICIES: dict[str, Policy] = {
    "least_time": least_time,
    "round_robin": _each(_in_turn),
    "random": _each(_at_random),
    "least_loaded": _each(_least_loaded),
    "prefix_affinity": _each(_longest_prefix),
    "power_of_two": _each(_better_of_two),
}
