"""What /metrics says: this router's own counts and times, and the last word of every worker and store it knows.

    request_metrics   tenant_metrics                    counted here, for as long as the process lives
    worker_metrics    store_metrics   cluster_metrics   read at a scrape from what others said last, and kept nowhere

Each of those files declares its metrics (`router/families.py`) and is the place for another one.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from cluster.config import Config
from router import cluster_metrics, request_metrics, store_metrics, tenant_metrics, worker_metrics
from router.fair_queue import FairQueue
from router.request import Request
from router.request_metrics import CANCELLED, FINISHED
from router.scrape import Scrape

__all__ = ["CANCELLED", "FAMILIES", "FINISHED", "Metrics"]

FAMILIES = (
    *request_metrics.FAMILIES,
    *tenant_metrics.FAMILIES,
    *cluster_metrics.FAMILIES,
    *worker_metrics.FAMILIES,
    *store_metrics.FAMILIES,
)


class Metrics:
    """One router's registry. A request is counted once, when it ends: finished, cancelled, or an error's code."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = request_metrics.REQUESTS.counter(self._registry)
        self._refused = request_metrics.REFUSED.counter(self._registry)
        self._placed = request_metrics.PLACED.counter(self._registry)
        self.ttft = request_metrics.TTFT.histogram(self._registry)
        self.itl = request_metrics.ITL.histogram(self._registry)
        self.e2e = request_metrics.E2E.histogram(self._registry)
        self._waited = request_metrics.QUEUED.histogram(self._registry)
        self._exposed = request_metrics.EXPOSED.histogram(self._registry)
        self.tenants = tenant_metrics.TenantMetrics(self._registry)
        for outcome in request_metrics.OUTCOMES:
            self._requests.labels(outcome)
        for reason in request_metrics.REFUSALS:
            self._refused.labels(reason)
        for kind in request_metrics.PLACEMENTS:
            self._placed.labels(kind)

    def watch(self, queue: FairQueue) -> None:
        """From now on what waits in it is on the page."""
        self._registry.register(_Queue(queue))

    def promise(self, config: Config) -> None:
        """From now on what this deployment is to keep is on the page."""
        self._registry.register(_Promises(config))

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

    def placed(self, request: Request) -> None:
        """It has ended: where it was placed, as often as it was, and what its handoffs cost."""
        for decision in request.decisions:
            self._placed.labels(decision.kind).inc()
        for seconds in request.exposed_s:
            self._exposed.observe(seconds)

    def page(self, scrape: Scrape) -> bytes:
        """The page in Prometheus text format."""
        others = CollectorRegistry()
        others.register(_Others(scrape))
        return generate_latest(self._registry) + generate_latest(others)


class _Queue(Collector):
    """What waits in the router, by priority; never by tenant."""

    def __init__(self, queue: FairQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        waiting: dict[str, list[int]] = {name: [] for name in request_metrics.PRIORITY_CLASSES}
        for item in self._queue:
            waiting[request_metrics.PRIORITY_CLASSES[1 + (item.priority > 0) - (item.priority < 0)]].append(item.tokens)
        yield request_metrics.QUEUE_REQUESTS.metric(([name], len(tokens)) for name, tokens in waiting.items())
        yield request_metrics.QUEUE_TOKENS.metric(([name], sum(tokens)) for name, tokens in waiting.items())


class _Promises(Collector):
    """What the configuration says that alerts compare with."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def collect(self) -> Iterator[Metric]:
        objectives = {"ttft": self._config.ttft_slo, "itl": self._config.itl_slo}
        yield request_metrics.SLO.metric(([name], seconds) for name, seconds in objectives.items())
        yield cluster_metrics.wanted(self._config)


class _Others(Collector):
    """Workers, stores, index and controller as they are at one scrape."""

    def __init__(self, scrape: Scrape) -> None:
        self._scrape = scrape

    def collect(self) -> Iterator[Metric]:
        yield from cluster_metrics.collect(self._scrape)
        yield from worker_metrics.collect(self._scrape.links)
        yield from store_metrics.collect(self._scrape.stores, self._scrape.mirror)
