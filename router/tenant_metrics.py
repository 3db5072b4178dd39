"""Tokens and GPU time per tenant, for bills: with a bounded number of labels, and none that says who it is.

A tenant's label is the beginning of its tag, an HMAC under the cluster secret; the operator who has the secret and the
key can compute it (`kvstore.hashing.tenant_tag`), nobody else can go back. The first `MOST` tenants of a router's life
have labels of their own, all later ones share `OTHERS`.

GPU time is divided as it passes: twice a second each worker's time, times its shards, is divided equally among the jobs
that it has. What a worker does nothing in is nobody's. A shard counts as one GPU, also where it runs on CPUs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry

from router.families import counter
from router.outputs import WorkerLink
from router.request import Request

MOST = 16
OTHERS = "other"
LABEL_DIGITS = 8
SAMPLE_S = 0.5

TOKENS = counter(
    "tandem_tenant_tokens_total", ("tenant", "kind"), "tokens",
    "tokens of a tenant's requests: of the prompt computed or cached, and output", "served",
)  # fmt: skip
GPU_SECONDS = counter(
    "tandem_gpu_seconds_total", ("model", "tenant"), "GPU seconds",
    "time of workers spent on a tenant's requests, times their shards; a price per GPU hour / 3600 makes it money",
    "served",
)  # fmt: skip
FAMILIES = (TOKENS, GPU_SECONDS)


class TenantMetrics:
    """What each tenant had from one router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._labels: set[str] = set()
        self._tokens = TOKENS.counter(registry)
        self._gpu_seconds = GPU_SECONDS.counter(registry)

    def prompt(self, request: Request, cached_tokens: int) -> None:
        label = self._label(request.tenant)
        self._tokens.labels(label, "cached").inc(cached_tokens)
        self._tokens.labels(label, "computed").inc(len(request.prompt) - cached_tokens)

    def output(self, request: Request, tokens: int) -> None:
        self._tokens.labels(self._label(request.tenant), "output").inc(tokens)

    def worked(self, model: str, tenant: str, seconds: float) -> None:
        self._gpu_seconds.labels(model, self._label(tenant)).inc(seconds)

    def _label(self, tenant: str) -> str:
        label = tenant[:LABEL_DIGITS]
        if label not in self._labels and len(self._labels) == MOST:
            return OTHERS
        self._labels.add(label)
        return label


def shares(links: Iterable[WorkerLink], seconds: float) -> Iterable[tuple[str, float]]:
    """(tenant, GPU seconds) of every job of this router: a worker's jobs have equal parts, those of other routers
    too."""
    for link in links:
        jobs = link.tenants
        if link.load is None or not jobs:
            continue
        everybodys = max(link.load.running + link.load.waiting, len(jobs))
        for tenant in jobs:
            yield tenant, seconds * link.info.tp * link.info.pp / everybodys


class GpuTime:
    """Divides the time of the workers of one model, from `start` to `close`."""

    def __init__(self, model: str, links: Callable[[], Iterable[WorkerLink]], tenants: TenantMetrics) -> None:
        self._model = model
        self._links = links
        self._tenants = tenants
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="gpu time")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            now_s = time.monotonic()
            for tenant, seconds in shares(self._links(), now_s - last_s):
                self._tenants.worked(self._model, tenant, seconds)
            last_s = now_s
