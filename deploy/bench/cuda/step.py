"""Rows of a whole decode step of a model of Llama 3 8B's shape: against reading its weights and KV once.

The engine's decoder and batch, from embedding to token, as one graph; what the host does between steps is not in it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.bench.cuda.random_model import LLAMA, decoder, read_bytes, step
from deploy.bench.cuda.rows import Call, Case, Row
from kernels.sampling import sample_rows
from workers.weights import Weights

BATCHES = (1, 16, 64)
CONTEXT = 2048
GATE = 0.65


def rows() -> list[Row]:
    return [_row(batch) for batch in BATCHES]


def _row(batch: int) -> Row:
    kv = batch * CONTEXT * LLAMA.num_layers * 2 * LLAMA.num_kv_heads * LLAMA.head_dim * 2
    attention = 4.0 * batch * CONTEXT * LLAMA.num_layers * LLAMA.num_heads * LLAMA.head_dim
    return Row(
        kernel="decode step",
        shape=f"Llama 3 8B, random weights, batch {batch}, context {CONTEXT}",
        moved=float(read_bytes(LLAMA) + kv),
        flop=batch * read_bytes(LLAMA) + attention,
        build=functools.partial(_build, batch),
        gate=GATE,
    )


def _build(batch: int) -> Case:
    model, weights, table = decoder(LLAMA)
    words, cache = step(LLAMA, batch, CONTEXT)

    def call() -> Tensor:
        logits = model.forward(words, cache)
        assert logits is not None
        return sample_rows(logits, words.temperature, words.top_k, words.top_p, words.min_p, words.words)

    def check() -> float:
        """Greedy tokens are where the logits are largest; that these are right is for the parity rows."""
        logits = model.forward(words, cache)
        assert logits is not None
        assert bool(logits.isfinite().all()), "the logits are not all finite"
        return float((logits.float().argmax(-1) != call()).float().mean())

    return Case([call], check, 0.0, {"torch and SDPA, dense": functools.partial(_plain, weights, table, batch)})


def _plain(weights: Weights, table: Tensor, batch: int) -> Sequence[Call]:
    """The same model with torch's own operations and keys that lie in order."""
    a = LLAMA
    shape = (a.num_layers, 2, batch, a.num_kv_heads, CONTEXT, a.head_dim)
    kv = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    tokens = torch.randint(0, a.vocab_size, (batch,), device="cuda")
    cos, sin = table[CONTEXT - 1]
    rotated = a.num_heads + a.num_kv_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (a.hidden_size,), weight, a.norm_epsilon)

    def call() -> Tensor:
        assert weights.embedding is not None
        assert weights.norm is not None
        assert weights.logits is not None
        hidden = F.embedding(tokens, weights.embedding)
        for layer, (k, v) in zip(weights.layers, kv, strict=True):
            qkv = layer.qkv(norm(hidden, layer.attention_norm)).view(batch, -1, a.head_dim)
            qk = qkv[:, :rotated]
            qk = qk * cos + qk.roll(a.head_dim // 2, -1) * sin
            k[:, :, -1], v[:, :, -1] = qk[:, a.num_heads :], qkv[:, rotated:]
            attended = F.scaled_dot_product_attention(qk[:, : a.num_heads, None], k, v, enable_gqa=True)
            hidden = hidden + layer.output(attended.reshape(batch, -1))
            gate, up = layer.gate_up(norm(hidden, layer.mlp_norm)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return weights.logits(norm(hidden, weights.norm)).argmax(-1)

    return [call]
