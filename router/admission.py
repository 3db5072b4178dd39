"""What may wait for a worker, when the next request goes to one, and when to give one up: decided from values.

No clock, no fleet, no state but `Throughput`'s sums; the router (`router/gate.py`) and the simulator decide by the
same functions. Requests wait in the router, because there they can be ordered, counted and refused; a worker's own
queue is kept just long enough that it never runs dry (`AHEAD_MS`). Refusing early and saying when to come back is
kinder than a queue without end: clients obey Retry-After, and one that is refused for too long gives up (openai-python
ignores delays over 120 s), so it stays within 1 to 30 s. Order is `router/fair_queue.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.errors import Overloaded
from router.fair_queue import FairQueue, Waiting
from router.table import Columns, FleetTable

AHEAD_MS = 250.0  # of work that workers have queued: what they compute while a report and the next prompt travel
MAX_WAIT_S = 60.0  # nobody is let in whose turn is predicted to come later
RETRY_MIN_S = 1.0
RETRY_MAX_S = 30.0
REMEMBERED_MS = 10_000.0  # of queueing that `Throughput` measures by
PRIOR_MS = 1_000.0  # of queueing: what the performance model's word weighs


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the fleet is predicted to do with prompts."""

    backlog_ms: float  # until some worker would start a new one; inf: nobody is there
    token_ms: (
        float  # from one waiting prompt token to the next, over the whole fleet, as measured; inf: nobody is there
    )
    slots: int  # sequences that workers can take in, with one more each that they have ready for when another ends
    compute_ms: float  # of a prompt token, over the whole fleet, by the performance model alone


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait at most."""

    requests: int
    wait_s: float = MAX_WAIT_S  # as many uncached prompt tokens as the fleet is predicted to take in this time


class Throughput:
    """How fast prompts are served while others wait, measured; the performance model's word at first.

    Whatever the fleet lacks most (compute, sequence slots, KV blocks, what other routers take) shows in it.
    """

    def __init__(self) -> None:
        self._ms = 0.0
        self._tokens = 0.0
        self._since_s: float | None = None  # since when something has waited; None: nothing does
        self._waited_ms = 0.0  # since tokens were last observed
        self._served = 0  # prompt tokens, meanwhile

    def served(self, tokens: int) -> None:
        """A prompt of so many tokens has its first output."""
        if self._since_s is not None:
            self._served += tokens

    def advance(self, now_s: float, waiting: bool) -> None:
        """It is that time, and something waits, or nothing does. Time counts only while something does, and is told
        when a prompt is done: a long one takes many looks."""
        if self._since_s is not None:
            self._waited_ms += 1000 * (now_s - self._since_s)
        if self._served:
            self.observe(self._waited_ms, self._served)
            self._waited_ms, self._served = 0.0, 0
        self._since_s = now_s if waiting else None

    def pause(self) -> None:
        """There is nobody whose throughput could be measured."""
        self._since_s = None

    def observe(self, waited_ms: float, tokens: int) -> None:
        """Something waited all that time, in which prompts of so many tokens had their first output."""
        keep = math.exp(-waited_ms / REMEMBERED_MS)
        self._ms = keep * self._ms + waited_ms
        self._tokens = keep * self._tokens + tokens

    def token_ms(self, predicted: float) -> float:
        """Milliseconds per token; `predicted` is the performance model's."""
        measured = self._ms / max(1.0, self._tokens)
        return (self._ms * measured + PRIOR_MS * predicted) / (self._ms + PRIOR_MS)


def outlook(table: FleetTable, max_sequences: int, throughput: Throughput) -> Outlook:
    """Of a fleet whose workers run at most `max_sequences` each."""
    if not len(table):
        return Outlook(math.inf, math.inf, 0, math.inf)
    compute_ms = table.fixed(_compute_ms)
    decoders = table.decoders if table.decoders.size else table.rows
    batch, free = table.batch[decoders], table.blocks_free[decoders]
    full = (free <= 0) & (batch > 0)  # what comes would wait there for others to end
    slots = np.maximum(0.0, max_sequences + 1 - batch)[~full]
    return Outlook(table.backlog_ms(), throughput.token_ms(compute_ms), int(slots.sum()), compute_ms)


def alone_ms(table: FleetTable, tokens: int) -> float:
    """Computing a prompt of so many tokens on whoever does it fastest, with nothing in front of it; inf: nobody."""
    if not len(table):
        return math.inf
    step, token, pair, step_tokens = _takers(table)
    return float((step * np.ceil(tokens / step_tokens) + token * tokens + pair * tokens**2 / 2).min())


def may_go(outlook: Outlook, requests: int, tokens: int) -> bool:
    """Whether the next request goes to a worker, when so many with so many tokens have gone that no worker's figures
    show yet."""
    return outlook.slots > requests and outlook.backlog_ms + _ms(tokens, outlook) < AHEAD_MS


def admit(
    queue: FairQueue, item: Waiting, limits: Limits, outlook: Outlook, prefill_ms: float, now_s: float, jitter: float
) -> tuple[Waiting, ...]:
    """Those who make room for `item`, to be refused in its place; nobody, usually. Changes nothing.

    `prefill_ms` is its prefill with nothing in front of it; `jitter` a uniform random number in [0, 1), which spreads
    the retries of clients that were refused together. Raises Overloaded with `retry_after_s` when it may not wait:
    when it asked for a deadline that it is predicted to miss, and when the queue is full of requests that stand before
    it.
    """
    if item.deadline_s is not None:
        first_token_ms = outlook.backlog_ms + prefill_ms + _ms(queue.ahead(item), outlook)
        if now_s + first_token_ms / 1000 > item.deadline_s:
            raise too_late(queue, item, outlook, first_token_ms, jitter)
    return _room_for(queue, item, limits, outlook, jitter)


def refusal(queue: FairQueue, outlook: Outlook, jitter: float) -> Overloaded:
    """What a request gets that is not to wait, or not any more."""
    return Overloaded(
        f"{len(queue)} requests of {queue.tokens} prompt tokens are waiting and no more may; retry later, or add"
        " workers",
        retry_after_s=retry_after_s(queue, outlook, jitter),
    )


def too_late(queue: FairQueue, item: Waiting, outlook: Outlook, first_token_ms: float, jitter: float) -> Overloaded:
    """What a request gets whose own deadline would be missed."""
    assert item.deadline_s is not None
    prediction = "no worker is there yet" if math.isinf(first_token_ms) else f"predicted in {first_token_ms:.0f} ms"
    return Overloaded(
        f"the first token was asked for within {1000 * (item.deadline_s - item.arrival_s):.0f} ms and would be late"
        f" ({prediction}); retry later, or allow more time",
        retry_after_s=retry_after_s(queue, outlook, jitter),
    )


def hopeless(item: Waiting, outlook: Outlook, prefill_ms: float, now_s: float) -> bool:
    """Whether the deadline of a request that waits would be missed even if it went next."""
    return item.deadline_s is not None and now_s + (outlook.backlog_ms + prefill_ms) / 1000 > item.deadline_s


def retry_after_s(queue: FairQueue, outlook: Outlook, jitter: float) -> float:
    """Seconds until half of the queue should be gone, spread over [1/2, 3/2) of that, within 1 to 30."""
    drained_ms = outlook.backlog_ms + _ms(queue.tokens / 2, outlook)
    drained_s = RETRY_MAX_S / 2 if math.isinf(drained_ms) else drained_ms / 1000
    return min(RETRY_MAX_S, max(RETRY_MIN_S, drained_s * (0.5 + jitter)))


def _room_for(queue: FairQueue, item: Waiting, limits: Limits, outlook: Outlook, jitter: float) -> tuple[Waiting, ...]:
    """A single request may be larger than the limit: then it waits alone."""
    known = 0 < outlook.compute_ms < math.inf
    most = 1000 * limits.wait_s / outlook.compute_ms if known else math.inf  # not of what is measured, which is rough
    requests, tokens = len(queue), queue.tokens

    def fits() -> bool:
        return not requests or (requests < limits.requests and tokens + item.tokens <= most)

    if fits():
        return ()
    standing = queue.standing(item)
    displaced: list[Waiting] = []
    for worst, its in queue.worst_first():
        if its <= standing:
            break
        displaced.append(worst)
        requests, tokens = requests - 1, tokens - worst.tokens
        if fits():
            return tuple(displaced)
    raise refusal(queue, outlook, jitter)


def _ms(tokens: float, outlook: Outlook) -> float:
    """Until that many waiting tokens have gone; none take no time even where nobody is there."""
    return tokens * outlook.token_ms if tokens else 0.0


def _compute_ms(table: FleetTable) -> float:
    """Of a prompt token, over all who take prompts."""
    step, token, pair, step_tokens = _takers(table)
    per_ms = (step_tokens / np.maximum(1e-6, step + token * step_tokens + pair * step_tokens**2 / 2)).sum()
    return 1 / float(per_ms)


def _takers(table: FleetTable) -> Columns:
    """`prefill_rates` of those whom prompts are sent to first."""
    rows = table.prefillers if table.prefillers.size else table.rows
    return tuple(rates[rows] for rates in table.prefill_rates)
