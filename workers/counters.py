"""Lifetime counters of a worker: what its engine did, and what its transfers did.

Two objects, because two threads count: the engine's thread and the event loop. The fields of both are those of
`cluster.messages.Load` with the same names, so that they can be copied over by name. They count and decide nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cluster.messages import Load
from kvstore.fetcher import Path


@dataclass(slots=True)
class EngineCounters:
    """For the engine's thread."""

    steps_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    device_tokens_total: int = 0
    output_tokens_total: int = 0
    recomputed_tokens_total: int = 0
    fetches_total: int = 0
    recomputes_total: int = 0
    model_seconds_total: float = 0.0
    busy_seconds_total: float = 0.0
    idle_seconds_total: float = 0.0

    def passed_over(self, tokens: int) -> None:
        """A store has them, and computing them was predicted to be faster."""
        self.recomputed_tokens_total += tokens
        self.recomputes_total += 1


@dataclass(slots=True)
class Counters:
    """Of the transfers, for the event loop."""

    handoffs_total: int = 0
    handoff_bytes_total: int = 0
    handoff_seconds_total: float = 0.0
    handoff_failures_total: int = 0
    fetched_memory_tokens_total: int = 0
    fetched_disk_tokens_total: int = 0
    fetched_remote_tokens_total: int = 0
    fetched_bytes_total: int = 0
    fetch_seconds_total: float = 0.0
    fetch_failures_total: int = 0
    offloaded_blocks_total: int = 0
    offload_failures_total: int = 0

    def fetched(self, path: Path, tokens: int) -> None:
        match path:
            case "memory":
                self.fetched_memory_tokens_total += tokens
            case "disk":
                self.fetched_disk_tokens_total += tokens
            case "remote":
                self.fetched_remote_tokens_total += tokens

    def fill(self, load: Load) -> Load:
        """The engine's account with that of the transfers in it."""
        return replace(load, **asdict(self))
