"""The cheapest deployment that keeps its promise: how many workers of which shape, by searching instead of by rule.

The promise is that a share of the requests stays within the SLOs. Whether a deployment keeps it, `measure` says (a
simulation, or anything else that is monotone in the numbers of workers); this file only chooses what to ask, and asks
little: pools start in the proportion in which prefill and decode are equally busy (rate matching, arXiv:2506.05508
section 4), bisection finds the smallest multiple that passes and then how many of each pool can still go, and a
candidate that needs more GPUs at its very least than the best found so far is not measured at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cluster.perfmodel import decode_ms, prefill_ms
from loadtests.simulator.hardware import Shape, Speed
from loadtests.simulator.traffic import Traffic

PREFILL_BUSY = 0.9  # of its time a prefill worker can compute; waiting for work to arrive takes the rest
DECODE_BUSY = 0.92
LEAST = 0.8  # of what `matched` says: bursts need more than that, and the model of it is not off by more
MOST = 4.0  # times what it says; beyond that a candidate is given up


@dataclass(frozen=True, slots=True)
class Pools:
    """A deployment. With no prefill workers, the others do both."""

    prefill: int
    decode: int
    prefill_shape: Shape
    decode_shape: Shape
    placement: str = "least_time"

    @property
    def gpus(self) -> int:
        return self.prefill * self.prefill_shape.gpus + self.decode * self.decode_shape.gpus

    @property
    def command(self) -> str:
        """The flags of `tandem serve` for it."""
        flags = {"prefill": self.prefill, "decode": self.decode}
        if self.prefill:
            flags |= {"prefill-tp": self.prefill_shape.tp, "prefill-pp": self.prefill_shape.pp}
        flags |= {"decode-tp": self.decode_shape.tp, "decode-pp": self.decode_shape.pp}
        text = " ".join(
            f"--{name} {value}" for name, value in flags.items() if value != 1 or name in ("prefill", "decode")
        )
        return text if self.placement == "least_time" else f"{text} --placement {self.placement}"


@dataclass(frozen=True, slots=True)
class Found:
    pools: Pools
    attainment: float  # share of the requests within the SLOs


def matched(traffic: Traffic, prefill: Speed, decode: Speed, itl_ms: float) -> tuple[float, float] | None:
    """Workers that each pool needs when all of its time is used, as fractions; None: no number of them would do.

    One worker computes 1 / prefill_ms of such prompts, and decodes batch / decode_ms(batch) tokens per ms with the
    largest batch that stays within the ITL SLO and the worker's memory.
    """
    batch = largest_batch(decode, traffic.context, itl_ms)
    if not batch or traffic.longest > min(prefill.kv_tokens, decode.kv_tokens):
        return None
    per_token = prefill_ms(prefill.rates, max(1, round(traffic.new_tokens)), round(traffic.cached_tokens)) / max(
        1.0, traffic.new_tokens
    )
    prefill_share = traffic.uncached_tokens_s * per_token / 1000
    decode_share = (
        traffic.output_tokens_s * decode_ms(decode.rates, batch, round(batch * traffic.context)) / batch / 1000
    )
    return prefill_share / PREFILL_BUSY, decode_share / DECODE_BUSY


def largest_batch(speed: Speed, context: float, itl_ms: float) -> int:
    """Sequences of that context that one worker decodes together within the ITL; 0: not even one."""
    least, most = 0, max(0, int(speed.kv_tokens / max(1.0, context)))
    while least < most:
        middle = (least + most + 1) // 2
        fits = decode_ms(speed.rates, middle, round(middle * context)) <= itl_ms
        least, most = (middle, most) if fits else (least, middle - 1)
    return least


def cheapest(
    candidates: Iterable[tuple[Pools, tuple[float, float]]],
    measure: Callable[[Pools], float],
    attainment: float,
    most_gpus: int,
) -> list[Found]:
    """The smallest deployment of each candidate that keeps the promise, cheapest first; [] when none does.

    A candidate is its shapes and placement (its numbers are not read) and what `matched` says of it. Those with the
    least to gain come last, so that most of them are never measured.
    """
    found: list[Found] = []
    for pools, shares in sorted(candidates, key=lambda c: scaled(c[0], c[1], LEAST).gpus):
        limit = min([most_gpus, *(f.pools.gpus for f in found)])
        if scaled(pools, shares, LEAST).gpus > limit:
            continue
        # a size above the limit may be below it once a pool's surplus is taken away
        if best := _smallest(_sizes(pools, shares, most_gpus), measure, attainment):
            found.append(best)
    return sorted(found, key=lambda f: (f.pools.gpus, -f.attainment))


def scaled(pools: Pools, shares: tuple[float, float], factor: float) -> Pools:
    """So many times what `matched` says, in whole workers."""
    prefill, decode = (max(1, math.ceil(factor * share - 1e-9)) for share in shares)
    if not pools.prefill:
        return replace(pools, decode=max(1, math.ceil(factor * sum(shares) - 1e-9)))
    return replace(pools, prefill=prefill, decode=decode)


def _smallest(sizes: list[Pools], measure: Callable[[Pools], float], attainment: float) -> Found | None:
    """By bisection: first of these sizes, then of each pool's number alone."""
    known: dict[Pools, float] = {}

    def passes(tried: Pools) -> bool:
        if tried not in known:
            known[tried] = measure(tried)
        return known[tried] >= attainment

    first = _first(sizes, passes)
    if first is None:
        return None
    # the bottleneck has enough now; of the others there may be too many
    without = [replace(first, prefill=n) for n in range(1, first.prefill)]
    first = _first(without, passes) or first
    without = [replace(first, decode=n) for n in range(1, first.decode)]
    first = _first(without, passes) or first
    return Found(first, known[first])


def _first(sizes: list[Pools], passes: Callable[[Pools], bool]) -> Pools | None:
    """By bisection; passing is taken to be monotone."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(sizes[middle]) else (middle + 1, high)
    return sizes[high] if high < len(sizes) else None


def _sizes(pools: Pools, shares: tuple[float, float], limit: int) -> list[Pools]:
    """Every deployment in that proportion within the limit of GPUs, growing."""
    sizes: list[Pools] = []
    parts = [sum(shares)] if not pools.prefill else shares
    # the factors at which one of the numbers goes up
    steps = {n / share for share in parts if share > 0 for n in range(1, math.ceil(MOST * share) + 2)}
    for factor in sorted({LEAST} | {step for step in steps if step >= LEAST}):
        size = scaled(pools, shares, factor)
        if size.gpus <= limit and size not in sizes:
            sizes.append(size)
    return sizes
