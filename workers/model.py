"""The decoder that Llama, SmolLM2, Mistral, Qwen2 and Qwen3 are: one definition, over whatever weights exist.

A step over the flat batch: embed, then per layer attention and gated MLP around a residual stream, then logits of the
rows that sample. It writes every token's keys and values into the cache before attending, so prefill, chunk
continuation, prefix hit and decode are the same computation. A shard computes its stage's layers, each with its own
heads and columns, and adds up with its stage's other ranks: the residual stream has the same bits on all of them.
Tensor letters as in kernels/reference; Hq, Hkv and V are the shard's own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.attention import paged_attention, write_kv_inplace
from kernels.norm_rope import rms_norm, rope_inplace
from workers.architecture import Architecture
from workers.batch import StepBatch
from workers.cache import KvCache
from workers.links import Links
from workers.shard import Shard
from workers.weights import LayerWeights, Weights


class Decoder:
    def __init__(
        self, architecture: Architecture, shard: Shard, weights: Weights, rope_table: Tensor, links: Links
    ) -> None:
        self._architecture = architecture
        self._shard = shard
        self._weights = weights
        self._rope_table = rope_table  # [max context, 2, D]
        self._links = links
        self._heads = shard.heads[1] - shard.heads[0]
        self._kv_heads = shard.kv_heads[1] - shard.kv_heads[0]

    def forward(self, batch: StepBatch, cache: KvCache) -> Tensor | None:
        """Logits [R, V] of the rows that sample, or None when none does or the stage is not the last. Fills the
        batch's slots of the cache."""
        a, links = self._architecture, self._links
        cache.clear(batch.fresh_blocks)
        hidden = self._hidden(batch)  # [T, hidden]
        cos, sin = self._rope_table.index_select(0, batch.positions).unbind(1)  # [T, D]
        for index, layer in enumerate(self._weights.layers):
            x = rms_norm(hidden, layer.attention_norm, a.norm_epsilon)
            attended = self._attention(index, layer, x, cos, sin, batch, cache)
            links.sum_inplace(attended)
            hidden += attended
            x = layer.down(silu_and_mul(layer.gate_up(rms_norm(hidden, layer.mlp_norm, a.norm_epsilon))))
            links.sum_inplace(x)
            hidden += x
        if self._weights.logits is None or self._weights.norm is None:
            links.send(hidden)
            return None
        if not batch.sampled:
            return None
        rows = hidden.index_select(0, batch.sample_rows)
        return self._weights.logits(rms_norm(rows, self._weights.norm, a.norm_epsilon))

    def _hidden(self, batch: StepBatch) -> Tensor:  # [T, hidden]
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

    def _attention(
        self,
        index: int,  # within the stage
        layer: LayerWeights,
        x: Tensor,  # [T, hidden]
        cos: Tensor,  # [T, D]
        sin: Tensor,  # [T, D]
        batch: StepBatch,
        cache: KvCache,
    ) -> Tensor:  # [T, hidden], to be added up over the stage's ranks
        a, heads, kv_heads = self._architecture, self._heads, self._kv_heads
        qkv = layer.qkv(x).view(x.shape[0], -1, a.head_dim)  # [T, Hq + 2 Hkv, D]
        qk = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk.copy_(rms_norm(qk, layer.qk_norm, a.norm_epsilon))
        rope_inplace(qk, cos, sin)
        write_kv_inplace(cache.token_rows[index], batch.write_rows, qkv[:, heads:])
        segments = batch.segments[a.windows[self._shard.layers[0] + index]]
        attended = paged_attention(qkv[:, :heads], cache.block_rows[index], segments, kv_heads, a.head_dim**-0.5)
        return layer.output(attended)
