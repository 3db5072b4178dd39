"""How workers are chosen from what they cost: the policy that counts milliseconds, and others to compare it with.

A policy takes the costs of one prompt and who may serve it, and returns rows: (prefill or None, decode), and the best
other pair where it knows one. Only `least_time` weighs both halves together, and lets the decode worker compute the
prompt although there are prefill workers; the others choose each half by their rule. Pure but for the random numbers
that two of them draw; ties go to the smaller id.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from router.costs import Costs
from router.table import Bools, FleetTable, Floats, Ints

CANDIDATES = 4  # prefill workers, the best for the prompt alone, that are paired with every decode worker
LIKE_MS = 1.0  # costs that differ by less are as good as equal
LIKE_PART = 0.05  # ... or by this part of the least time to a first token: predictions are not that good

Pair = tuple[int | None, int]  # rows of the table: prefill, decode


@dataclass(frozen=True, slots=True)
class Eligible:
    """Rows that may serve. Without any for prefill, who decodes computes the prompt, too."""

    prefill: Bools
    decode: Bools


Policy = Callable[[Costs, Eligible, random.Random], tuple[Pair, Pair | None]]


def least_time(costs: Costs, eligible: Eligible, _: random.Random) -> tuple[Pair, Pair | None]:
    """The least sum of everybody's waiting. Of workers that are as good as equal the one not used for longest: cold
    prompts spread, and so do those that share no more than their first blocks."""
    prompt, table = costs.prompt, costs.table
    output = np.where(eligible.decode, costs.decode + costs.others, np.inf)
    like = max(LIKE_MS, LIKE_PART * prompt.item(prompt.argmin()))
    alone = prompt + output + costs.interference
    rows = _candidates(prompt, eligible.prefill, table, like)
    totals = prompt.take(rows)[:, None] + costs.handoff(rows) + output  # [candidates, workers]
    least = alone.item(alone.argmin())
    least_pair = totals.item(totals.argmin()) if rows.size else np.inf
    if least_pair < least:
        candidate = int((totals.min(axis=1) <= least_pair + like).argmax())  # the first is the one used least recently
        chosen = int(rows[candidate]), int(totals[candidate].argmin())
        totals[candidate, chosen[1]] = np.inf
        return chosen, _least(alone, rows, totals)
    equal = (alone <= least + like).nonzero()[0]
    decode = int(equal[table.last_used(equal).argmin()])
    alone[decode] = np.inf
    return (None, decode), _least(alone, rows, totals)


def _candidates(prompt: Floats, eligible: Bools, table: FleetTable, like: float) -> Ints:
    """Rows of the best prefill workers, those used least recently first."""
    rows = eligible.nonzero()[0]
    if rows.size > CANDIDATES:
        times = prompt.take(rows)
        equal = rows[times <= times.item(times.argmin()) + like]
        if equal.size < CANDIDATES:
            rows = rows[times.argpartition(CANDIDATES - 1)[:CANDIDATES]]
        else:
            rows = equal[table.last_used(equal).argpartition(CANDIDATES - 1)[:CANDIDATES]]
    return rows[table.last_used(rows).argsort()]


def _least(alone: Floats, rows: Ints, totals: Floats) -> Pair | None:
    """Of what is left; None: nothing is."""
    decode = int(alone.argmin())
    if rows.size:
        candidate, other = divmod(int(totals.argmin()), alone.size)
        if totals[candidate, other] < alone[decode]:
            return int(rows[candidate]), other
    return (None, decode) if alone[decode] < np.inf else None


# ---------------------------------------------------------------------------------------------- for comparison
def _each(pick: Callable[[Costs, Ints, random.Random], int]) -> Policy:
    """The policy that picks both workers by one rule, each without regard to the other."""

    def policy(costs: Costs, eligible: Eligible, rng: random.Random) -> tuple[Pair, Pair | None]:
        prefill = np.flatnonzero(eligible.prefill)
        first = pick(costs, prefill, rng) if prefill.size else None
        return (first, pick(costs, np.flatnonzero(eligible.decode), rng)), None

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
