"""The decoder that Llama, SmolLM2, Mistral, Qwen2 and Qwen3 are: one definition, over whatever weights exist.

A step over the flat batch: embed, then per layer attention and gated MLP around a residual stream, then logits of the
rows that sample. It writes every token's keys and values into the cache before attending, so prefill, chunk
continuation, prefix hit and decode are the same computation. Tensor letters as in kernels/reference.
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
from workers.weights import LayerWeights, Weights


class Decoder:
    def __init__(self, architecture: Architecture, weights: Weights, rope_table: Tensor) -> None:
        self._architecture = architecture
        self._weights = weights
        self._rope_table = rope_table  # [max context, 2, D]

    def forward(self, batch: StepBatch, cache: KvCache) -> Tensor | None:
        """Logits [R, V] of the rows that sample, or None when none does. Fills the batch's slots of the cache."""
        a = self._architecture
        cache.clear(batch.fresh_blocks)
        hidden = F.embedding(batch.token_ids, self._weights.embedding)  # [T, hidden]
        cos, sin = self._rope_table.index_select(0, batch.positions).unbind(1)  # [T, D]
        for index, layer in enumerate(self._weights.layers):
            hidden += self._attention(
                index, layer, rms_norm(hidden, layer.attention_norm, a.norm_epsilon), cos, sin, batch, cache
            )
            hidden += layer.down(silu_and_mul(layer.gate_up(rms_norm(hidden, layer.mlp_norm, a.norm_epsilon))))
        if not batch.sampled:
            return None
        rows = hidden.index_select(0, batch.sample_rows)
        return self._weights.logits(rms_norm(rows, self._weights.norm, a.norm_epsilon))

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,  # [T, hidden]
        cos: Tensor,  # [T, D]
        sin: Tensor,  # [T, D]
        batch: StepBatch,
        cache: KvCache,
    ) -> Tensor:  # [T, hidden]
        a = self._architecture
        qkv = layer.qkv(x).view(x.shape[0], -1, a.head_dim)  # [T, Hq + 2 Hkv, D]
        qk = qkv[:, : a.num_heads + a.num_kv_heads]
        if layer.qk_norm is not None:
            qk.copy_(rms_norm(qk, layer.qk_norm, a.norm_epsilon))
        rope_inplace(qk, cos, sin)
        write_kv_inplace(cache.token_rows[index], batch.write_rows, qkv[:, a.num_heads :])
        segments = batch.segments[a.windows[index]]
        rows = cache.block_rows[index]
        attended = paged_attention(qkv[:, : a.num_heads], rows, segments, a.num_kv_heads, a.head_dim**-0.5)
        return layer.output(attended)
