"""What a step of the largest size needs of a GPU's memory, found by computing one, and so what is left for KV.

It looks before the weights are loaded too, since that takes minutes, and asks all ranks of a stage: they must have as
many blocks as the one with the least room. What the figures mean is `workers.gpu_memory`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.errors import ModelError
from cluster.messages import Generation, Sampling
from kvstore.layout import Layout
from workers.architecture import Architecture
from workers.device import Device
from workers.gpu_memory import GIB, Profile, blocks_for
from workers.links import Links
from workers.runner import Chunk, Stage
from workers.sequence import Sequence
from workers.shard import Shard
from workers.weights import shapes


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step and the longest sequence."""

    token_budget: int
    max_sequences: int
    max_context: int


class MemoryProfile:
    """Looks what the GPU has left: before the weights are loaded, and after a step of the largest size. Raises
    ModelError, naming what would fit, when a longest sequence does not."""

    def __init__(
        self,
        device: Device,
        architecture: Architecture,
        shard: Shard,
        block_layout: Layout,  # scales included, where there are some
        itemsize: int,  # bytes of a weight
        limits: Limits,
    ) -> None:
        if shard.pp > 1:
            raise ModelError("pipeline stages on GPUs cannot agree on the size of their KV caches; set kv_memory")
        self._device, self._shard, self._layout, self._limits = device, shard, block_layout, limits
        values = sum(math.prod(shape) for shape in shapes(architecture).values())
        self._weights = values * itemsize // shard.tp
        total, used = device.memory(lambda: None)
        self._blocks(Profile(total, used + self._weights, self._weights))

    def blocks(self, made: Callable[[int], Stage], links: Links) -> int:
        """Of the KV cache, the same on all ranks. `made` is a runner with so many."""

        def largest() -> None:
            chunks = largest_step(self._limits, self._layout.tokens)
            made(1 + max(max(chunk.sequence.block_table) for chunk in chunks)).run(chunks)

        try:
            total, peak = self._device.memory(largest)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"a step of {self._limits.token_budget} tokens and {self._limits.max_sequences} sequences does not fit "
                f"on the GPU beside {self._weights / GIB:.1f} GiB of weights; lower token_budget or max_sequences"
            ) from None
        own = torch.tensor([self._blocks(Profile(total, peak, self._weights))], device=self._device.place)
        return int(links.gather(own).min())

    def _blocks(self, profile: Profile) -> int:
        part = self._shard.part(self._layout)
        return blocks_for(profile, part.block_bytes, part.tokens, self._limits.max_context, self._shard.tp)


def largest_step(limits: Limits, block_size: int) -> list[Chunk]:
    """As many tokens, and as many sequences that sample, as a step may have."""
    rest, takes = limits.token_budget, list[int]()
    while rest and len(takes) < limits.max_sequences:
        left = limits.max_sequences - len(takes) - 1
        takes.append(min(max(1, rest - left), limits.max_context - 1))
        rest -= takes[-1]
    chunks, block = [], 0
    for index, take in enumerate(takes):
        made = Sequence(Generation(str(index), (0,) * take, (), Sampling(), b"", 0), "", b"", 0.0)
        count = -(-take // block_size)
        made.block_table = list(range(block, block + count))
        block += count
        chunks.append(Chunk(made, 0, take))
    return chunks
