"""How many KV blocks a GPU has room for, from what its memory held at the worst moment of the largest step. Pure.

A share of the memory is left alone: graphs, staging memory and what allocators lose between their pieces live there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.errors import ModelError

UTILISATION = 0.90  # of all of the GPU's memory
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Profile:
    """Bytes of one GPU."""

    total: int
    peak: int  # in use at the worst moment of the largest step, weights included, by whomever
    weights: int  # of this shard

    @property
    def room(self) -> int:
        """For KV."""
        return int(self.total * UTILISATION) - self.peak


def blocks_for(profile: Profile, block_bytes: int, block_size: int, max_context: int, tp: int) -> int:
    """At least one longest sequence's. `block_bytes` are those of this shard, one of `tp`. Raises ModelError, naming
    what would fit."""
    blocks, needed = max(0, profile.room) // block_bytes, -(-max_context // block_size)
    if blocks >= needed:
        return blocks
    choices = [f"lower max_context to {blocks * block_size}"] if blocks else []
    if (ranks := _ranks(profile, needed * block_bytes)) is not None:
        choices.append(f"share it among {tp * ranks} GPUs by tensor parallelism")
    raise ModelError(
        f"a GPU of {profile.total / GIB:.1f} GiB, of which {UTILISATION:.0%} are used, holds "
        f"{profile.peak / GIB:.1f} GiB at the peak of a step ({profile.weights / GIB:.1f} GiB of weights) and has room "
        f"for the KV of {blocks * block_size} tokens, fewer than one sequence of {max_context}; "
        + (" or ".join(choices) or "lower token_budget, free the GPU of others, or take one with more memory")
    )


def _ranks(profile: Profile, kv_bytes: int) -> int | None:
    """Among how many times as many GPUs weights and KV fit; what else a step needs does not shrink. None: no number."""
    spare = int(profile.total * UTILISATION) - (profile.peak - profile.weights)
    return math.ceil((profile.weights + kv_bytes) / spare) if spare > 0 else None
