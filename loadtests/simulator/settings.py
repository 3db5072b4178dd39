"""What a simulated cluster is: its workers' speed and memory, links, policies, and what goes wrong when.

Everything that makes a real router's knowledge late is a number here (`report_s`, `cache_s`), because with perfect
knowledge approximate policies look as good as precise ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.errors import ConfigError
from cluster.messages import Rates
from kvstore.prefix_map import CAPACITY


@dataclass(frozen=True, slots=True)
class SimSettings:
    """`prefill` of the `workers` compute prompts and the others decode; 0: every worker does both (aggregated)."""

    rates: Rates  # of every worker; of those that decode, `decode_rates`
    block_size: int  # tokens, as in the trace
    workers: int = 8
    prefill: int | None = None  # None: half of them
    decode_rates: Rates | None = None  # None: as `rates`
    kv_tokens: int = 400_000  # room for KV on each worker
    kv_bytes: int = 163_840  # of one token
    max_sequences: int = 256  # that run on a worker at once
    workers_per_node: int = 2  # they share a block store and a NIC
    nic_bytes_s: float | None = None  # of a node and direction; None: what one fetch by `rates.remote` reaches
    store_tokens: int = 0  # room for KV in each node's store
    map_blocks: int = CAPACITY  # of the router's prefix map
    placement: str = "least_time"
    max_queue: int = 100_000  # requests that may wait in the router
    report_s: float = 0.1  # between two reports of a worker's load
    cache_s: float = 0.1  # between two reports of what its KV cache holds
    start_s: float = 30.0  # from the order to start a worker to its first request
    failures: tuple[tuple[float, int], ...] = ()  # (when, which worker by its number) dies, and is started again
    autoscaling: str = ""  # a policy of cluster/autoscaling.py; "": roles and workers stay as they are
    scale: tuple[int, int] | None = None  # shards at least and at most; None: as many as there are at first
    shards: tuple[int, int] = (1, 1)  # GPUs per worker that prefills, decodes
    plan_s: float = 0.5  # between two plans
    ttft_slo_ms: float = 30_000.0
    itl_slo_ms: float = 100.0
    seed: int = 0
    leap: bool = True  # False: one event per decode step, for tests
    max_s: float = 10 * 86_400.0  # of virtual time; what has not ended by then counts as unfinished

    def __post_init__(self) -> None:
        if self.workers < 1 or not 0 <= self.prefillers <= self.workers:
            raise ConfigError(f"{self.prefillers} of {self.workers} workers cannot prefill; give at least one worker")
        if 0 < self.prefillers == self.workers > 1:
            raise ConfigError("nobody decodes; give fewer prefill workers, or 0 of them for aggregated serving")
        step = min(self.rates_of(role).step_tokens for role in ("prefill", "decode"))
        if step <= self.max_sequences:
            raise ConfigError(f"a step of {step} tokens is too small for {self.max_sequences} sequences and a prompt")
        if min(self.report_s, self.cache_s, self.plan_s) <= 0:
            raise ConfigError("reports and plans take time; give report_s, cache_s and plan_s above 0")
        for when_s, worker in self.failures:
            if when_s < 0 or not 0 <= worker < self.workers:
                raise ConfigError(
                    f"failure {when_s}:{worker}: the workers are 0 to {self.workers - 1}, times 0 or later"
                )

    @property
    def prefillers(self) -> int:
        """Workers of role prefill at the start."""
        if self.prefill is not None:
            return self.prefill
        return 0 if self.workers == 1 else max(1, self.workers // 2)

    @property
    def gpus(self) -> int:
        """At the start."""
        return self.prefillers * self.shards[0] + (self.workers - self.prefillers) * self.shards[1]

    @property
    def blocks(self) -> int:
        """KV blocks of a worker."""
        return self.kv_tokens // self.block_size

    def rates_of(self, role: str) -> Rates:
        return self.decode_rates if role == "decode" and self.decode_rates else self.rates

    def values(self) -> dict[str, Any]:
        """For a report: plain values by name."""
        return asdict(self)

    def changed(self, **values: Any) -> SimSettings:
        return replace(self, **values)
