"""The metrics of workers: their load, what they computed and moved, how they spend their time, what they predict.

Declarations, each with what reads it, and the samples of one scrape. All of it is in the frames that workers send
anyway; nothing here asks anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric

from cluster.messages import Load
from cluster.perfmodel import decode_ms, prefill_ms
from router.families import Family, counter, gauge
from router.outputs import WorkerLink

BY_WORKER = ("worker",)

UP = gauge("tandem_worker_up", ("worker", "role"), "0, 1", "1 while the worker is connected", "worker lost")
START = gauge(
    "tandem_worker_start_seconds", BY_WORKER, "seconds", "from its process's start to its registration", "steady"
)
LOADS: tuple[tuple[Family, Callable[[Load], float]], ...] = (
    (gauge("tandem_worker_running", BY_WORKER, "sequences", "in the batch", "served"), lambda load: load.running),
    (
        gauge("tandem_worker_waiting", BY_WORKER, "sequences", "waiting for room in the batch", "waiting"),
        lambda load: load.waiting,
    ),
    (
        gauge("tandem_worker_waiting_tokens", BY_WORKER, "tokens", "of prompts, not yet computed", "waiting"),
        lambda load: load.waiting_tokens,
    ),
    (
        gauge("tandem_worker_kv_blocks", BY_WORKER, "blocks", "in its KV cache", "steady"),
        lambda load: load.blocks_total,
    ),
    (
        gauge("tandem_worker_kv_blocks_used", BY_WORKER, "blocks", "of those, held by sequences", "served"),
        lambda load: load.blocks_total - load.blocks_free,
    ),
    (
        gauge("tandem_worker_kv_blocks_free", BY_WORKER, "blocks", "of those, held by no sequence", "served"),
        lambda load: load.blocks_free,
    ),
    (
        gauge("tandem_worker_kv_blocks_cached", BY_WORKER, "blocks", "free ones that a prefix hit can use", "served"),
        lambda load: load.blocks_cached,
    ),
    (counter("tandem_steps_total", BY_WORKER, "steps", "of the engine", "served"), lambda load: load.steps_total),
    (
        counter("tandem_prompt_tokens_total", BY_WORKER, "tokens", "of prompts, computed", "served"),
        lambda load: load.prompt_tokens_total,
    ),
    (
        counter("tandem_cached_tokens_total", BY_WORKER, "tokens", "of prompts, found in any cache", "served"),
        lambda load: load.cached_tokens_total,
    ),
    (
        counter("tandem_output_tokens_total", BY_WORKER, "tokens", "generated", "served"),
        lambda load: load.output_tokens_total,
    ),
    (
        counter(
            "tandem_preemptions_total", BY_WORKER, "sequences",
            "that gave their KV blocks up for an older one, to be resumed", "preempted",
        ),
        lambda load: load.preemptions_total,
    ),
    (
        counter(
            "tandem_handoffs_total", BY_WORKER, "handoffs", "received from prefill workers, whole or not", "served"
        ),
        lambda load: load.handoffs_total,
    ),
    (
        counter("tandem_handoff_bytes_total", BY_WORKER, "bytes", "of KV received in handoffs", "served"),
        lambda load: load.handoff_bytes_total,
    ),
    (
        counter(
            "tandem_handoff_seconds_total", BY_WORKER, "seconds",
            "spent receiving handoffs, most of it while the prompt is still being computed", "served",
        ),
        lambda load: load.handoff_seconds_total,
    ),
    (
        counter(
            "tandem_handoff_failures_total", BY_WORKER, "handoffs",
            "that brought less than everything; the rest was computed", "worker lost",
        ),
        lambda load: load.handoff_failures_total,
    ),
    (
        counter("tandem_fetch_bytes_total", BY_WORKER, "bytes", "of KV fetched from stores; no handoffs", "fetched"),
        lambda load: load.fetched_bytes_total,
    ),
    (
        counter("tandem_fetch_seconds_total", BY_WORKER, "seconds", "spent fetching", "fetched"),
        lambda load: load.fetch_seconds_total,
    ),
    (
        counter("tandem_fetch_failures_total", BY_WORKER, "fetches", "that brought less than asked for", "corrupt"),
        lambda load: load.fetch_failures_total,
    ),
    (
        counter(
            "tandem_recomputed_tokens_total", BY_WORKER, "tokens",
            "of prompts, computed although a store had them, because that was predicted to be faster", "computed",
        ),
        lambda load: load.recomputed_tokens_total,
    ),
    (
        counter("tandem_offloaded_blocks_total", BY_WORKER, "blocks", "written to a store outside handoffs", "written"),
        lambda load: load.offloaded_blocks_total,
    ),
    (
        counter("tandem_offload_failures_total", BY_WORKER, "blocks", "that no store took", "store lost"),
        lambda load: load.offload_failures_total,
    ),
)  # fmt: skip
PARTS: tuple[tuple[Family, dict[str, Callable[[Load], float]]], ...] = (  # the last label -> its value
    (
        counter(
            "tandem_fetched_tokens_total", ("worker", "source"), "tokens",
            "of prompts, whose KV was fetched from a store's memory or disk on this machine, or from a remote store",
            "fetched",
        ),
        {
            "memory": lambda load: load.fetched_memory_tokens_total,
            "disk": lambda load: load.fetched_disk_tokens_total,
            "remote": lambda load: load.fetched_remote_tokens_total,
        },
    ),
    (
        counter(
            "tandem_prompt_source_tokens_total", ("worker", "source"), "tokens",
            "of prompts, by where their KV came from: device (the worker's own cache), memory, disk, remote (a store's,"
            " as above), computed. What a decode worker is handed over does not count", "served",
        ),
        {
            "device": lambda load: load.device_tokens_total,
            "memory": lambda load: load.fetched_memory_tokens_total,
            "disk": lambda load: load.fetched_disk_tokens_total,
            "remote": lambda load: load.fetched_remote_tokens_total,
            "computed": lambda load: load.prompt_tokens_total,
        },
    ),
    (
        counter(
            "tandem_fetch_decisions_total", ("worker", "decision"), "decisions",
            "about blocks that a store has and the worker has not: fetch, or recompute", "fetched",
        ),
        {"fetch": lambda load: load.fetches_total, "recompute": lambda load: load.recomputes_total},
    ),
    (
        counter(
            "tandem_step_seconds_total", ("worker", "phase"), "seconds",
            "of the engine's thread: model (waiting for a step's result), engine (scheduling, bookkeeping, events),"
            " idle", "served",
        ),
        {
            "model": lambda load: load.model_seconds_total,
            "engine": lambda load: max(0.0, load.busy_seconds_total - load.model_seconds_total),
            "idle": lambda load: load.idle_seconds_total,
        },
    ),
)  # fmt: skip
ERROR = gauge(
    "tandem_model_error", ("worker", "of"), "ratio",
    "of the worker's performance model lately: mean of abs(predicted - measured) / measured, of prefill, decode and"
    " fetch", "served",
)  # fmt: skip
PREFILL_MS = gauge("tandem_model_prefill_ms", BY_WORKER, "ms", "predicted for 1,000 prompt tokens", "served")
DECODE_MS = gauge("tandem_model_decode_ms", BY_WORKER, "ms", "predicted for a decode step of what runs now", "served")

FAMILIES = (UP, START, *(family for family, _ in LOADS), *(family for family, _ in PARTS), ERROR, PREFILL_MS, DECODE_MS)


def collect(links: Sequence[WorkerLink]) -> Iterator[Metric]:
    yield UP.metric(([link.info.id, link.role], float(link.alive)) for link in links)
    loads = [(link.info.id, link.load) for link in links if link.load is not None]
    for family, read in LOADS:
        yield family.metric(([worker], read(load)) for worker, load in loads)
    for family, parts in PARTS:
        yield family.metric(([worker, part], of(load)) for worker, load in loads for part, of in parts.items())
    yield from _models(links)


def _models(links: Sequence[WorkerLink]) -> Iterator[Metric]:
    """How well the workers' performance models predict, and what."""
    known = [(link.info.id, link.load, link.rates) for link in links if link.load and link.rates]
    yield ERROR.metric(
        ([worker, of], getattr(rates, f"{of}_error"))
        for worker, _, rates in known
        for of in ("prefill", "decode", "fetch")
    )
    yield PREFILL_MS.metric(([worker], prefill_ms(rates, 1_000, 0)) for worker, _, rates in known)
    yield DECODE_MS.metric(
        ([worker], decode_ms(rates, load.running, load.context_tokens)) for worker, load, rates in known
    )
    yield START.metric(([worker], rates.start_s) for worker, _, rates in known)
