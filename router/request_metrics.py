"""The metrics of requests, which a router counts itself, and of what waits in it.

Declarations only; `router/metrics.py` keeps the values. Where a label has a known set of values, every one of them is
on the page from the start: a counter that begins at 1 shows no increase.
"""

from __future__ import annotations

from typing import get_args

from cluster.errors import StartupError, TandemError, subclasses
from router.families import counter, gauge, histogram
from router.placement import Kind

FINISHED = "finished"
CANCELLED = "cancelled"
OUTCOMES = (FINISHED, CANCELLED, *sorted(subclasses(TandemError).keys() - subclasses(StartupError).keys()))
REFUSALS = ("door", "displaced", "late", "timeout", "nobody", "closed")
PLACEMENTS: tuple[str, ...] = get_args(Kind)
PRIORITY_CLASSES = ("before", "normal", "after")
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
WAIT_BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
EXPOSED_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

REQUESTS = counter(
    "tandem_requests_total", ("outcome",), "requests",
    "generation requests by how they ended: finished, cancelled (its client left), or the code of an error", "served",
)  # fmt: skip
TTFT = histogram(
    "tandem_time_to_first_token_seconds", (), "seconds", "arrival to first token, per choice", "served", TTFT_BUCKETS_S
)
ITL = histogram(
    "tandem_inter_token_latency_seconds", (), "seconds", "time between tokens, per delivery", "served", ITL_BUCKETS_S
)
E2E = histogram(
    "tandem_request_seconds", (), "seconds", "arrival to end of requests that finished", "served", E2E_BUCKETS_S
)
QUEUED = histogram(
    "tandem_queue_seconds", (), "seconds", "how long requests waited in the router for a worker", "served",
    WAIT_BUCKETS_S,
)  # fmt: skip
EXPOSED = histogram(
    "tandem_handoff_exposed_seconds", (), "seconds",
    "the part of a handoff that nothing hides: from the prefill worker's token to the decode worker's word that it has"
    " everything", "served", EXPOSED_BUCKETS_S,
)  # fmt: skip
REFUSED = counter(
    "tandem_refused_total", ("reason",), "requests",
    "not let through to a worker: door (the queue is full, or the deadline asked for would be missed), displaced (by a"
    " request that stands before it), late (its deadline passed by while it waited), timeout (waited for"
    " request_timeout), nobody (the last worker was lost while it waited), closed (the router shut down)", "waiting",
)  # fmt: skip
QUEUE_REQUESTS = gauge(
    "tandem_queue_requests", ("priority",), "requests",
    "waiting in the router: of a priority before 0, of 0 (normal), and after", "waiting",
)  # fmt: skip
QUEUE_TOKENS = gauge(
    "tandem_queue_tokens", ("priority",), "tokens", "prompt tokens of those, as far as known", "waiting"
)
PLACED = counter(
    "tandem_placements_total", ("kind",), "placements",
    "where requests that have ended were placed: disaggregated (one worker prefills, another decodes), append (whoever"
    " decodes has the beginning of the prompt and computes the rest), aggregated (one worker does both)", "served",
)  # fmt: skip
SLO = gauge(
    "tandem_slo_seconds", ("objective",), "seconds", "what is to be kept: ttft_slo and itl_slo of the configuration",
    "steady",
)  # fmt: skip

COUNTED = (REQUESTS, TTFT, ITL, E2E, QUEUED, EXPOSED, REFUSED, PLACED)
FAMILIES = (*COUNTED, QUEUE_REQUESTS, QUEUE_TOKENS, SLO)
