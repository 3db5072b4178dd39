"""A metric as operators know it: its name, what it counts, and the scenario that moves it.

Every metric on the page is one `Family`, declared once beside what reads it. `docs/metrics.md` is printed from the same
objects (`router/metrics_reference.py`), and a test of a real deployment walks through them, scenario by scenario. Names
are stable: a dashboard that was built on one must not break. No values are kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

Kind = Literal["counter", "gauge", "histogram"]
Scenario = Literal[
    "steady", "served", "waiting", "preempted", "fetched", "computed", "written", "evicted", "corrupt", "pinned",
    "expired", "worker lost", "store lost", "redis lost", "role changed", "resized", "gpu",
]  # fmt: skip

SCENARIOS: dict[Scenario, str] = {
    "steady": "nothing: it is a fact, there at all times and above zero",
    "served": "requests are served, some by two workers and some twice",
    "waiting": "more requests come than workers can begin, and more than may wait",
    "preempted": "sequences need more KV blocks than a worker has",
    "fetched": "a prompt comes again whose KV no worker has any more, but a store",
    "computed": "the same, when computing is predicted to be faster than fetching",
    "written": "blocks are written to a store, and from there to disk",
    "evicted": "more blocks come than a store has room for",
    "corrupt": "the bytes of a block on disk change",
    "pinned": "an operator pins a prefix",
    "expired": "nobody comes for the blocks of a handoff",
    "worker lost": "a worker is killed while it serves",
    "store lost": "the store is killed while it is written to",
    "redis lost": "Redis loses what it has, and is stopped for a while",
    "role changed": "prompts become so many that a decode worker turns to prefill",
    "resized": "the pool grows by a worker and shrinks again, sooner than its requests end",
    "gpu": "the driver of a worker's node tells of a GPU; the test brings a driver of its own",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `name` is that of its samples: a counter's ends in `_total`, a histogram's go on with `_bucket`,
    `_sum` and `_count`."""

    kind: Kind
    name: str
    labels: tuple[str, ...]
    unit: str
    meaning: str
    moved_by: Scenario
    buckets: tuple[float, ...] = ()

    def metric(self, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
        """With values that are read at a scrape, as (label values, value)."""
        made: CounterMetricFamily | GaugeMetricFamily
        if self.kind == "counter":
            made = CounterMetricFamily(self.name, self.meaning, labels=self.labels)
        else:
            made = GaugeMetricFamily(self.name, self.meaning, labels=self.labels)
        for labels, value in samples:
            made.add_metric(labels, value)
        return made

    def counter(self, registry: CollectorRegistry) -> Counter:
        """Kept by the router itself."""
        return Counter(self.name, self.meaning, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Kept by the router itself."""
        return Histogram(self.name, self.meaning, self.labels, buckets=self.buckets, registry=registry)


counter, gauge, histogram = partial(Family, "counter"), partial(Family, "gauge"), partial(Family, "histogram")
