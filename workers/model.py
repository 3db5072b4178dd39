"""The decoder that Llama, SmolLM2, Mistral, Qwen2 and Qwen3 are: one definition, over whatever weights exist.

A step over the flat batch: embed, then per layer attention and gated MLP around a residual stream, then logits of the
rows that sample. It writes every token's keys and values into the cache before attending, so prefill, chunk
continuation, prefix hit and decode are the same computation. A shard computes its stage's layers, each with its own
heads and columns, and adds up with its stage's other ranks: the residual stream has the same bits on all of them.
Tensor letters as in kernels/reference; Hq, Hkv and V are the shard's own.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.norm_rope import add_rms_norm_inplace, rms_norm
from workers.architecture import Architecture
from workers.attention import Attention, Geometry
from workers.cache import KvCache
from workers.links import Links
from workers.shard import Shard
from workers.weights import Weights


class Batch(Protocol):
    """A step: `workers.batch` has it for the CPU, `workers.device_batch` for GPUs."""

    @property
    def token_ids(self) -> Tensor: ...  # [T]

    @property
    def sample_rows(self) -> Tensor: ...  # [R]: rows whose logits are wanted

    def attention(self, geometry: Geometry, rope_table: Tensor, cache: KvCache) -> Attention: ...


class Decoder:
    def __init__(
        self, architecture: Architecture, shard: Shard, weights: Weights, rope_table: Tensor, links: Links
    ) -> None:
        self._architecture = architecture
        self._shard = shard
        self._weights = weights
        self._rope_table = rope_table  # [max context, 2, D]
        self._links = links
        self._geometry = Geometry(
            shard.heads[1] - shard.heads[0],
            shard.kv_heads[1] - shard.kv_heads[0],
            architecture.head_dim,
            architecture.norm_epsilon,
            architecture.windows[slice(*shard.layers)],
        )

    def forward(self, batch: Batch, cache: KvCache) -> Tensor | None:
        """Logits [R, V] of the rows that sample, or None when none does or the stage is not the last. Fills the
        batch's slots of the cache."""
        epsilon, links, layers = self._architecture.norm_epsilon, self._links, self._weights.layers
        attention = batch.attention(self._geometry, self._rope_table, cache)
        hidden = self._hidden(batch)  # [T, hidden]
        x = rms_norm(hidden, layers[0].attention_norm, epsilon)
        for index, layer in enumerate(layers):
            x = layer.output(attention(index, layer.qkv(x), layer.qk_norm))
            links.sum_inplace(x)
            x = add_rms_norm_inplace(hidden, x, layer.mlp_norm, epsilon)
            x = layer.down(silu_and_mul(layer.gate_up(x)))
            links.sum_inplace(x)
            if index + 1 < len(layers):
                x = add_rms_norm_inplace(hidden, x, layers[index + 1].attention_norm, epsilon)
        hidden += x
        if self._weights.logits is None or self._weights.norm is None:
            links.send(hidden)
            return None
        if not batch.sample_rows.numel():
            return None
        rows = hidden.index_select(0, batch.sample_rows)
        return self._weights.logits(rms_norm(rows, self._weights.norm, epsilon))

    def _hidden(self, batch: Batch) -> Tensor:  # [T, hidden]
        """What the stage starts from."""
        tokens, embedding = batch.token_ids, self._weights.embedding
        if embedding is None:
            return self._links.receive((tokens.shape[0], self._architecture.hidden_size), self._rope_table.dtype)
        if self._shard.tp == 1:
            return F.embedding(tokens, embedding)
        rows = tokens - self._shard.vocabulary[0]
        elsewhere = (rows < 0) | (rows >= embedding.shape[0])
        hidden = F.embedding(rows.masked_fill_(elsewhere, 0), embedding).masked_fill_(elsewhere[:, None], 0)
        self._links.sum_inplace(hidden)
        return hidden
