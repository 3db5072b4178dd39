"""The stage that computes on the CPU: weights, KV cache and decoder of one shard, behind `workers.runner.Stage`. A
worker that is one shard has it for a Runner.

Owns no policy and keeps no sequence: a step's chunks go in, tokens come out, and all that stays is the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import ModelError
from kvstore.layout import Layout
from workers.architecture import Architecture, layout, load_architecture, sizes
from workers.batch import build_batch
from workers.cache import KvCache
from workers.draw import Draw
from workers.links import Links, NoLinks
from workers.model import Decoder
from workers.rope import rope_table
from workers.runner import Alone, Chunk
from workers.shard import Shard, shards, whole
from workers.vocabulary import sample_slice
from workers.weights import load_weights

MIB = 2**20


class ModelRunner(Alone):
    def __init__(
        self,
        architecture: Architecture,
        shard: Shard,
        links: Links,
        decoder: Decoder,
        cache: KvCache,
        block_layout: Layout,  # of whole blocks
        max_context: int,
    ) -> None:
        self.architecture = architecture
        self.layout = block_layout
        self.shard = shard
        self.num_blocks = cache.blocks.shape[0]
        self.vocab_size = architecture.vocab_size
        self.max_context = max_context
        self._links = links
        self._decoder = decoder
        self._cache = cache
        self._part = shard.part(block_layout)
        self._windows = sorted(set(architecture.windows[slice(*shard.layers)]))

    @classmethod
    def load(
        cls,
        directory: Path,
        dtype: str,  # float32 or bfloat16: weights, activations and KV
        block_size: int,  # tokens
        kv_memory_bytes: int,  # of the worker: all its shards together
        max_context: int,  # tokens; 0: the model's own limit
        progress: Callable[[float], None] | None = None,
        shard: Shard | None = None,  # None: the worker's only one
        links: Links | None = None,  # to its other shards
    ) -> ModelRunner:
        """Raises ModelError when the model cannot be served with these settings, saying which would do."""
        architecture = load_architecture(directory)
        shard, links = shard or whole(sizes(architecture)), links or NoLinks()
        block_layout = layout(architecture, dtype, block_size)
        max_context = context(architecture, max_context)
        parts = [each.part(block_layout) for each in shards(sizes(architecture), shard.tp, shard.pp)]
        num_blocks = blocks_in(block_size, sum(part.block_bytes for part in parts), kv_memory_bytes, max_context)
        place, torch_dtype = torch.device("cpu"), getattr(torch, dtype)
        with torch.inference_mode():
            weights = load_weights(directory, architecture, shard, torch_dtype, place, progress)
            table = rope_table(architecture.rope, architecture.head_dim, max_context, torch_dtype).to(place)
            cache = KvCache(parts[shard.rank], num_blocks, place)
        decoder = Decoder(architecture, shard, weights, table, links)
        return cls(architecture, shard, links, decoder, cache, block_layout, max_context)

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        with torch.inference_mode():
            batch = build_batch(chunks, self._part, self._windows, self._cache.blocks.device)
            logits = self._decoder.forward(batch, self._cache)
            tokens: list[int | None] = [None] * len(chunks)
            if logits is not None:
                sequences = [chunks[index].sequence for index in batch.sampled]
                draws = [Draw(s.generation.sampling, s.tokens, s.prompt_length) for s in sequences]
                found = sample_slice(logits, draws, self.shard, self.vocab_size, self._links)
                for index, token in zip(batch.sampled, found, strict=True):
                    tokens[index] = token
            return tokens

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        return self._cache.bytes_of(index)


def context(architecture: Architecture, wanted: int) -> int:
    """Tokens of a longest sequence. Raises ModelError when the model has a lower limit. 0: the model's own."""
    if wanted > architecture.max_context:
        raise ModelError(f"max_context {wanted} exceeds the model's limit; use at most {architecture.max_context}")
    return wanted or architecture.max_context


def blocks_in(block_size: int, block_bytes: int, memory: int, max_context: int) -> int:
    """How many blocks the memory holds: at least one longest sequence. `block_bytes` are those of all shards, in which
    a head that several of them hold counts as often. Raises ModelError, naming what would do."""
    blocks, needed = memory // block_bytes, -(-max_context // block_size)
    if blocks < needed:
        raise ModelError(
            f"kv_memory of {memory / MIB:.0f} MiB holds {blocks * block_size} tokens, fewer than one sequence "
            f"of {max_context}; lower max_context to that or set kv_memory to {needed * block_bytes} bytes"
        )
    return blocks
