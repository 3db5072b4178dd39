"""What /metrics says: this router's own counts and times, and the last word of every worker and store it knows.

Worker and store values are read when Prometheus asks and are never kept here, so a worker that is gone is gone from
the page too. Worker counters start again at zero when a worker restarts, as Prometheus counters may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.messages import Load, Rates, StoreInfo
from cluster.perfmodel import decode_ms, prefill_ms
from cluster.store_messages import StoreStat
from kvstore.mirror import MirrorStat
from router.fair_queue import FairQueue
from router.outputs import WorkerLink

FINISHED = "finished"
CANCELLED = "cancelled"
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
WAIT_BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PRIORITY_CLASSES = ("before", "normal", "after")
E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

WORKER_GAUGES: dict[str, tuple[str, Callable[[Load], int]]] = {
    "tandem_worker_running": ("Sequences in the batch", lambda load: load.running),
    "tandem_worker_waiting": ("Sequences waiting", lambda load: load.waiting),
    "tandem_worker_waiting_tokens": ("Prompt tokens not yet computed", lambda load: load.waiting_tokens),
    "tandem_worker_kv_blocks_used": ("KV blocks held by sequences", lambda load: load.blocks_total - load.blocks_free),
    "tandem_worker_kv_blocks_free": ("KV blocks no sequence holds", lambda load: load.blocks_free),
    "tandem_worker_kv_blocks_cached": ("Free KV blocks a prefix hit can use", lambda load: load.blocks_cached),
    "tandem_worker_kv_blocks": ("KV blocks in all", lambda load: load.blocks_total),
}
WORKER_COUNTERS: dict[str, tuple[str, Callable[[Load], float]]] = {
    "tandem_steps": ("Engine steps", lambda load: load.steps_total),
    "tandem_prompt_tokens": ("Prompt tokens computed", lambda load: load.prompt_tokens_total),
    "tandem_cached_tokens": ("Prompt tokens found in a cache", lambda load: load.cached_tokens_total),
    "tandem_output_tokens": ("Tokens generated", lambda load: load.output_tokens_total),
    "tandem_preemptions": ("Sequences preempted", lambda load: load.preemptions_total),
    "tandem_handoff_bytes": ("KV bytes copied from a store", lambda load: load.handoff_bytes_total),
    "tandem_handoff_seconds": ("Time spent copying KV", lambda load: load.handoff_seconds_total),
    "tandem_handoff_failures": ("Handoffs that were recomputed", lambda load: load.handoff_failures_total),
    "tandem_fetch_bytes": ("KV bytes fetched from the offload tier", lambda load: load.fetched_bytes_total),
    "tandem_fetch_seconds": ("Time spent fetching KV", lambda load: load.fetch_seconds_total),
    "tandem_fetch_failures": ("Fetches that brought less than asked for", lambda load: load.fetch_failures_total),
    "tandem_recomputed_tokens": (
        "Prompt tokens a store had, computed because that was predicted to be faster",
        lambda load: load.recomputed_tokens_total,
    ),
    "tandem_offloaded_blocks": ("Blocks written to a store outside handoffs", lambda load: load.offloaded_blocks_total),
    "tandem_offload_failures": ("Blocks that no store took", lambda load: load.offload_failures_total),
}
FETCHED_TOKENS: dict[str, Callable[[Load], int]] = {  # where from -> prompt tokens whose KV came from there
    "memory": lambda load: load.fetched_memory_tokens_total,
    "disk": lambda load: load.fetched_disk_tokens_total,
    "remote": lambda load: load.fetched_remote_tokens_total,
}
STORE_GAUGES: dict[str, tuple[str, Callable[[StoreStat], int]]] = {
    "tandem_store_block_bytes": ("Bytes of one block", lambda stat: stat.block_bytes),
    "tandem_store_transfers": ("Handoffs under way", lambda stat: stat.transfers),
    "tandem_store_pinned_blocks": ("Cached blocks that are evicted last", lambda stat: stat.pinned),
    "tandem_store_disk_blocks": ("Blocks on disk", lambda stat: stat.disk_blocks),
    "tandem_store_disk_bytes": ("Bytes on disk", lambda stat: stat.disk_bytes),
    "tandem_store_disk_limit_bytes": ("Size of the disk tier; 0: there is none", lambda stat: stat.disk_limit_bytes),
}
STORE_STATES = ("free", "reserved", "held", "cached", "quarantined")
STORE_COUNTERS: dict[str, tuple[str, Callable[[StoreStat], int]]] = {
    "tandem_store_sealed_bytes": ("KV bytes sealed", lambda stat: stat.sealed_bytes_total),
    "tandem_store_evictions": ("Blocks evicted", lambda stat: stat.evictions_total),
    "tandem_store_expired": ("Holds that ran out", lambda stat: stat.expired_total),
    "tandem_store_disk_writes": ("Blocks written to disk", lambda stat: stat.disk_writes_total),
    "tandem_store_disk_reads": ("Blocks read from disk", lambda stat: stat.disk_reads_total),
    "tandem_store_disk_errors": ("Blocks not written, or unreadable", lambda stat: stat.disk_errors_total),
    "tandem_store_found_blocks": ("Blocks asked for and found", lambda stat: stat.found_blocks_total),
    "tandem_store_missed_blocks": ("Blocks asked for and not found", lambda stat: stat.missed_blocks_total),
    "tandem_store_fetched_blocks": ("Blocks sent to workers by Fetch", lambda stat: stat.fetched_blocks_total),
    "tandem_store_corrupt_blocks": ("Blocks dropped because they were corrupt", lambda stat: stat.corrupt_total),
}

StoreStats = Iterable[tuple[StoreInfo, StoreStat | None]]


class Metrics:
    """One router's registry. A request is counted once, when it ends: finished, cancelled, or an error's code."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tandem_requests", "Generation requests by how they ended", ["outcome"], registry=self._registry
        )
        self.ttft = Histogram(
            "tandem_time_to_first_token_seconds", "Arrival to first token, per choice",
            buckets=TTFT_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self.itl = Histogram(
            "tandem_inter_token_latency_seconds", "Time between tokens, per delivery",
            buckets=ITL_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self.e2e = Histogram(
            "tandem_request_seconds", "Arrival to end of requests that finished",
            buckets=E2E_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._waited = Histogram(
            "tandem_queue_seconds", "How long requests waited in the router for a worker",
            buckets=WAIT_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._refused = Counter(
            "tandem_refused", "Requests that were not let through to a worker", ["reason"], registry=self._registry
        )

    def watch(self, queue: FairQueue) -> None:
        """From now on what waits in it is on the page."""
        self._registry.register(_Queue(queue))

    def waited(self, seconds: float) -> None:
        self._waited.observe(seconds)

    def outcomes(self) -> dict[str, int]:
        """How many requests ended in which way, of this router's lifetime."""
        samples = (sample for metric in self._requests.collect() for sample in metric.samples)
        return {s.labels["outcome"]: int(s.value) for s in samples if s.name == "tandem_requests_total"}

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def ended(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def page(self, links: Iterable[WorkerLink], stores: StoreStats, mirror: MirrorStat | None) -> bytes:
        """The page in Prometheus text format."""
        fleet = CollectorRegistry()
        fleet.register(_Fleet(list(links), list(stores), mirror))
        return generate_latest(self._registry) + generate_latest(fleet)


class _Queue(Collector):
    """What waits in the router, by priority; never by tenant."""

    def __init__(self, queue: FairQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("tandem_queue_requests", "Requests waiting in the router", labels=["priority"])
        tokens = GaugeMetricFamily("tandem_queue_tokens", "Prompt tokens waiting in the router", labels=["priority"])
        for number, name in enumerate(PRIORITY_CLASSES):
            items = [item for item in self._queue if 1 + (item.priority > 0) - (item.priority < 0) == number]
            requests.add_metric([name], len(items))
            tokens.add_metric([name], sum(item.tokens for item in items))
        yield requests
        yield tokens


class _Fleet(Collector):
    """Workers and stores as they are at one scrape."""

    def __init__(
        self, links: list[WorkerLink], stores: list[tuple[StoreInfo, StoreStat | None]], mirror: MirrorStat | None
    ) -> None:
        self._links = links
        self._stores = stores
        self._mirror = mirror

    def collect(self) -> Iterator[Metric]:
        yield from self._workers()
        yield from _models([(link.info.id, link.load, link.rates) for link in self._links])
        yield from self._store_states()
        if self._mirror is not None:
            yield from _index(self._mirror)

    def _workers(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("tandem_worker_up", "1 while the worker is connected", labels=["worker", "role"])
        for link in self._links:
            up.add_metric([link.info.id, link.role], float(link.alive))
        yield up
        loads = [([link.info.id], link.load) for link in self._links if link.load is not None]
        for name, (documentation, gauge) in WORKER_GAUGES.items():
            family = GaugeMetricFamily(name, documentation, labels=["worker"])
            for labels, load in loads:
                family.add_metric(labels, gauge(load))
            yield family
        for name, (documentation, counter) in WORKER_COUNTERS.items():
            counters = CounterMetricFamily(name, documentation, labels=["worker"])
            for labels, load in loads:
                counters.add_metric(labels, counter(load))
            yield counters
        fetched = CounterMetricFamily(
            "tandem_fetched_tokens",
            "Prompt tokens whose KV was fetched from the offload tier",
            labels=["worker", "source"],
        )
        for labels, load in loads:
            for source, tokens in FETCHED_TOKENS.items():
                fetched.add_metric([*labels, source], tokens(load))
        yield fetched

    def _store_states(self) -> Iterator[Metric]:
        slabs = GaugeMetricFamily("tandem_store_slabs", "Slabs by state", labels=["store", "state"])
        up = GaugeMetricFamily("tandem_store_up", "1 when the store answered", labels=["store"])
        stats = [([store.id], stat) for store, stat in self._stores if stat is not None]
        for store, stat in self._stores:
            up.add_metric([store.id], float(stat is not None))
        for labels, stat in stats:
            for state in STORE_STATES:
                slabs.add_metric([*labels, state], getattr(stat, state))
        yield up
        yield slabs
        for name, (documentation, gauge) in STORE_GAUGES.items():
            gauges = GaugeMetricFamily(name, documentation, labels=["store"])
            for labels, stat in stats:
                gauges.add_metric(labels, gauge(stat))
            yield gauges
        for name, (documentation, counter) in STORE_COUNTERS.items():
            family = CounterMetricFamily(name, documentation, labels=["store"])
            for labels, stat in stats:
                family.add_metric(labels, counter(stat))
            yield family


def _models(workers: list[tuple[str, Load | None, Rates | None]]) -> Iterator[Metric]:
    """How well the workers' performance models predict, and what."""
    errors = GaugeMetricFamily(
        "tandem_model_error", "Mean of |predicted - measured| / measured lately", labels=["worker", "of"]
    )
    prefill = GaugeMetricFamily("tandem_model_prefill_ms", "Predicted for 1,000 prompt tokens", labels=["worker"])
    decode = GaugeMetricFamily("tandem_model_decode_ms", "Predicted for a step of what runs now", labels=["worker"])
    start = GaugeMetricFamily("tandem_worker_start_seconds", "From process start to registration", labels=["worker"])
    for worker, load, rates in workers:
        if rates is None:
            continue
        for of in ("prefill", "decode", "fetch"):
            errors.add_metric([worker, of], getattr(rates, f"{of}_error"))
        prefill.add_metric([worker], prefill_ms(rates, 1_000, 0))
        if load is not None:
            decode.add_metric([worker], decode_ms(rates, load.running, load.context_tokens))
        start.add_metric([worker], rates.start_s)
    yield from (errors, prefill, decode, start)


def _index(mirror: MirrorStat) -> Iterator[Metric]:
    yield GaugeMetricFamily("tandem_index_blocks", "Blocks in this router's copy of the index", mirror.blocks)
    yield GaugeMetricFamily(
        "tandem_index_behind_seconds", "Time since the copy was known to be complete; up to 1 is well", mirror.behind_s
    )
    yield CounterMetricFamily("tandem_index_events", "Changes followed", mirror.events_total)
    yield CounterMetricFamily("tandem_index_gaps", "Times that changes were missed", mirror.gaps_total)
    yield CounterMetricFamily("tandem_index_snapshots", "Times the copy was made anew", mirror.snapshots_total)
