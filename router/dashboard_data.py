"""What the dashboard and `tandem top` are told, from what one router knows: a pure function of plain values.

Workers' figures are of all that they do; requests, times and the queue are this router's own. With several replicas of
the router the answer is of the one that was asked (today there is one). No text, tokens or keys are in it; tenants are
opaque tags. Shares are from 0 to 1, times milliseconds, sizes bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.messages import ControllerInfo, Load, Rates, Role
from cluster.perfmodel import decode_ms, prefill_ms
from router.events import Event, State
from router.explain import body
from router.flows import Flow
from router.history import Sample
from router.last_minute import Percentiles
from router.watch import Ended

PROMPT_TOKENS = 1_000  # of the prompt whose prefill is predicted as a measure of a worker's speed
DIGITS = 3
FLOWS = tuple(figure.name for figure in dataclasses.fields(Flow))


@dataclass(frozen=True, slots=True)
class WorkerNow:
    """One worker as its stream told last. `load` None: it is not connected."""

    id: str
    role: Role
    state: State
    node: str
    load: Load | None
    rates: Rates | None
    flow: Flow


@dataclass(frozen=True, slots=True)
class Minute:
    """This router's requests of the last minute. None: there were none to tell it from."""

    ttft_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    slo_kept: float | None = None  # share of the requests that were answered within both SLOs
    hit_ratio: float | None = None  # share of prompts' tokens that were not computed
    outcomes: Mapping[str, int] = field(default_factory=dict)  # how requests ended -> how many
    seconds: int = 60  # that this is about; less in a router's first minute


@dataclass(frozen=True, slots=True)
class Seen:
    """What a router knows at one moment."""

    router: str
    model: str
    redis: bool  # reachable
    ttft_slo_ms: float
    itl_slo_ms: float
    workers: tuple[WorkerNow, ...]
    controller: ControllerInfo | None
    queue_requests: int
    queue_tokens: int  # of the prompts that wait
    minute: Minute
    flow: Flow  # of all workers
    events: tuple[Event, ...]
    now_s: float  # monotonic


def data(seen: Seen, history: Mapping[str, Any], ended: Iterable[Ended]) -> dict[str, Any]:
    """The answer of `/dashboard/data`: `history` as `History.after` gives it, and the requests that are to be told."""
    minute, told = seen.minute, seen.controller
    return {
        "router": seen.router,
        "model": seen.model,
        "redis": "reachable" if seen.redis else "unreachable",
        "slo": {"ttft_ms": seen.ttft_slo_ms, "itl_ms": seen.itl_slo_ms},
        "workers": [_worker(worker) for worker in seen.workers],
        "controller": told and {k: v for k, v in dataclasses.asdict(told).items() if k not in ("namespace", "events")},
        "queue": {"requests": seen.queue_requests, "tokens": seen.queue_tokens},
        "minute": {
            "seconds": minute.seconds,
            "requests_s": sum(minute.outcomes.values()) / max(1, minute.seconds),
            "outcomes": dict(minute.outcomes),
            "slo_kept": minute.slo_kept,
            "hit_ratio": minute.hit_ratio,
            "ttft_ms": _percentiles(minute.ttft_ms),
            "itl_ms": _percentiles(minute.itl_ms),
        },
        "per_second": _flow(seen.flow),
        "history": history,
        "events": [dataclasses.asdict(event) for event in seen.events],
        "requests": [_request(request, seen.now_s) for request in ended],
    }


def sample_of(seen: Seen) -> Sample:
    """What the history keeps of it."""
    loads = [worker.load for worker in seen.workers if worker.load is not None]
    roles = [worker.role for worker in seen.workers if worker.state == "serving"]
    blocks, minute, flow = sum(load.blocks_total for load in loads), seen.minute, seen.flow
    ttft, itl = minute.ttft_ms, minute.itl_ms
    return Sample(
        prefill=roles.count("prefill"),
        decode=roles.count("decode"),
        both=roles.count("both"),
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads) + seen.queue_requests,
        kv_used=1 - sum(load.blocks_free for load in loads) / blocks if blocks else None,
        ttft_p50_ms=None if ttft is None else ttft.p50,
        ttft_p95_ms=None if ttft is None else ttft.p95,
        itl_p50_ms=None if itl is None else itl.p50,
        itl_p95_ms=None if itl is None else itl.p95,
        hit_ratio=minute.hit_ratio,
        prompt_tokens_s=flow.prompt_tokens,
        output_tokens_s=flow.output_tokens,
        handoff_bytes_s=flow.handoff_bytes,
    )


def _worker(worker: WorkerNow) -> dict[str, Any]:
    load, rates = worker.load, worker.rates
    return {
        "id": worker.id,
        "role": worker.role,
        "state": worker.state,
        "node": worker.node,
        "running": load and load.running,
        "waiting": load and load.waiting,
        "waiting_tokens": load and load.waiting_tokens,
        "kv_blocks": load and load.blocks_total,
        "kv_blocks_used": load and load.blocks_total - load.blocks_free,
        "kv_blocks_cached": load and load.blocks_cached,
        "prefill_ms": rates and round(prefill_ms(rates, PROMPT_TOKENS, 0), DIGITS),
        "decode_ms": rates and round(decode_ms(rates, max(1, load.running), load.context_tokens), DIGITS)
        if load
        else None,
        "per_second": _flow(worker.flow),
    }


def _request(request: Ended, now_s: float) -> dict[str, Any]:
    figures = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    del figures["ended_s"], figures["decisions"]
    return _rounded(figures) | {
        "age_s": round(now_s - request.ended_s, DIGITS),
        "decisions": [body(decision) for decision in request.decisions],
    }


def _percentiles(found: Percentiles | None) -> dict[str, Any] | None:
    return None if found is None else _rounded(dataclasses.asdict(found))


def _flow(flow: Flow) -> dict[str, float]:
    return {name: round(getattr(flow, name), DIGITS) for name in FLOWS}


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in figures.items()}
