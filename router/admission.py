"""Whether one more request may wait, decided from values: no clock, no fleet, no state.

Refusing early and saying when to come back is kinder than a queue without end: clients obey Retry-After, and a client
that is refused for too long gives up (openai-python ignores delays over 120 s), so the estimate stays within 1 to 30 s.
It does not order the queue; that is the engine's scheduler.
"""

from __future__ import annotations

from cluster.errors import Overloaded

RETRY_MIN_S = 1.0
RETRY_MAX_S = 30.0


def admit(waiting: int, max_queue: int, throughput_per_s: float, jitter: float) -> None:
    """Return when a request may join `waiting` others; raise Overloaded with `retry_after_s` when it may not.

    `throughput_per_s` is the recent throughput in requests; `jitter` a uniform random number in [0, 1), which spreads
    the retries of clients that were refused together.
    """
    if waiting < max_queue:
        return
    raise Overloaded(
        f"{waiting} requests are waiting and the limit is {max_queue}; retry later, or add workers",
        retry_after_s=retry_after_s(waiting, throughput_per_s, jitter),
    )


def retry_after_s(waiting: int, throughput_per_s: float, jitter: float) -> float:
    """Seconds until half of the queue should be gone, spread over [1/2, 3/2) of that, within 1 to 30."""
    drained = waiting / 2 / throughput_per_s if throughput_per_s > 0 else RETRY_MAX_S / 2
    return min(RETRY_MAX_S, max(RETRY_MIN_S, drained * (0.5 + jitter)))
