"""Lifetime counters of what a worker's transfers did, one object that all of them add to.

The fields are those of `cluster.messages.Load` with the same names, so that they can be copied over by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cluster.messages import Load
from kvstore.fetcher import Path


@dataclass(slots=True)
class Counters:
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
