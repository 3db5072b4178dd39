"""What /metrics says: this router's own counts and times, and the last word of every worker and store it knows.

Worker and store values are read when Prometheus asks and are never kept here, so a worker that is gone is gone from
the page too. Worker counters start again at zero when a worker restarts, as Prometheus counters may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.messages import Load, StoreInfo
from cluster.store_messages import StoreStat
from kvstore.mirror import MirrorStat
from router.outputs import WorkerLink

FINISHED = "finished"
CANCELLED = "cancelled"
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
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

    def ended(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def page(self, links: Iterable[WorkerLink], stores: StoreStats, mirror: MirrorStat | None) -> bytes:
        """The page in Prometheus text format."""
        fleet = CollectorRegistry()
        fleet.register(_Fleet(list(links), list(stores), mirror))
        return generate_latest(self._registry) + generate_latest(fleet)


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


def _index(mirror: MirrorStat) -> Iterator[Metric]:
    yield GaugeMetricFamily("tandem_index_blocks", "Blocks in this router's copy of the index", mirror.blocks)
    yield GaugeMetricFamily(
        "tandem_index_behind_seconds", "Time since the copy was known to be complete; up to 1 is well", mirror.behind_s
    )
    yield CounterMetricFamily("tandem_index_events", "Changes followed", mirror.events_total)
    yield CounterMetricFamily("tandem_index_gaps", "Times that changes were missed", mirror.gaps_total)
    yield CounterMetricFamily("tandem_index_snapshots", "Times the copy was made anew", mirror.snapshots_total)
