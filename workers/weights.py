"""From safetensors files to the tensors that one shard multiplies with.

A shard reads its slices only: rows of what reads the residual stream (q, k, v, gate, up), columns of what writes to it
(output, down), rows of the vocabulary, and all of every norm. Layer by layer: read, convert, fuse (q|k|v and gate|up),
pack. At no time is there more than the weights so far and one matrix twice, before and after packing; the largest,
the output matrix, comes first.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.linear import Linear
from workers.architecture import Architecture
from workers.checkpoint import weight_files
from workers.shard import Shard, Span
from workers.slices import Stored, check, read_inplace, stored_tensors

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DERIVED = "rotary_emb.inv_freq"  # older checkpoints carry buffers that follow from config.json


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Hq, Hkv and I are the shard's own numbers of heads and columns."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # hidden -> (Hq + 2 Hkv) * D
    qk_norm: Tensor | None  # [Hq + Hkv, D]
    output: Linear  # Hq * D -> hidden; the sum over tensor ranks is the output, and rank 0 has its bias
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 I
    down: Linear  # I -> hidden; likewise


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor | None  # [V, hidden], the shard's part of the vocabulary; on the first stage
    layers: tuple[LayerWeights, ...]  # of its stage
    norm: Tensor | None  # [hidden]; on the last stage
    logits: Linear | None  # hidden -> V; on the last stage


def load_weights(
    directory: Path,
    architecture: Architecture,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None] | None = None,  # called with the fraction done, ending with 1.0
) -> Weights:
    """Raises ModelError, naming the file or tensor at fault, even if it is not the shard's."""
    stored = stored_tensors(weight_files(directory))
    # a tied checkpoint may carry the same matrix twice
    check(stored, shapes(architecture), (DERIVED, HEAD) if architecture.tied else (DERIVED,))
    reader = _Reader(stored, dtype, device)
    embedding, logits = _vocabulary(reader, architecture, shard)
    norm = reader.tensor(NORM) if shard.last_stage else None
    first, last = shard.layers
    layers = []
    for index in range(first, last):
        layers.append(_layer(reader, f"model.layers.{index}", architecture, shard))
        if progress is not None:
            progress((index - first + 1) / (last - first + 1))
    if progress is not None:
        progress(1.0)
    return Weights(embedding, tuple(layers), norm, logits)


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint: name -> shape."""
    hidden, q, kv = a.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (a.vocab_size, hidden), NORM: (hidden,)}
    if not a.tied:
        found[HEAD] = (a.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q, hidden, a.qkv_bias),
        "self_attn.k_proj": (kv, hidden, a.qkv_bias),
        "self_attn.v_proj": (kv, hidden, a.qkv_bias),
        "self_attn.o_proj": (hidden, q, a.output_bias),
        "mlp.gate_proj": (a.intermediate_size, hidden, a.mlp_bias),
        "mlp.up_proj": (a.intermediate_size, hidden, a.mlp_bias),
        "mlp.down_proj": (hidden, a.intermediate_size, a.mlp_bias),
    }
    for layer in (f"model.layers.{index}" for index in range(a.num_layers)):
        found |= {f"{layer}.{part}.weight": (hidden,) for part in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}.{part}.weight": (outputs, inputs) for part, (outputs, inputs, _) in linears.items()}
        found |= {f"{layer}.{part}.bias": (outputs,) for part, (outputs, _, bias) in linears.items() if bias}
        if a.qk_norm:
            found |= {f"{layer}.self_attn.{part}.weight": (a.head_dim,) for part in ("q_norm", "k_norm")}
    return found


def _vocabulary(reader: _Reader, a: Architecture, shard: Shard) -> tuple[Tensor | None, Linear | None]:
    """A tied model on the CPU that is one stage keeps the matrix twice: rows cannot be looked up in a packed weight,
    and multiplying with an unpacked one, the largest of all, would take a decode step up to twice as long."""
    logits = None
    if shard.last_stage and not (a.tied and shard.first_stage):
        logits = Linear(reader.rows((EMBEDDING if a.tied else HEAD, shard.vocabulary)))
    embedding = reader.rows((EMBEDDING, shard.vocabulary)) if shard.first_stage else None
    if shard.last_stage and logits is None and embedding is not None:
        logits = Linear(embedding)
    return embedding, logits


def _layer(reader: _Reader, name: str, a: Architecture, shard: Shard) -> LayerWeights:
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    q, kv = _times(shard.heads, a.head_dim), _times(shard.kv_heads, a.head_dim)

    def reads(bias: bool, *parts: tuple[str, Span]) -> Linear:
        """Projections of the residual stream, as one; `parts` are (name, rows)."""
        biases = reader.rows(*((f"{part}.bias", rows) for part, rows in parts)) if bias else None
        return Linear(reader.rows(*((f"{part}.weight", rows) for part, rows in parts)), biases)

    def writes(bias: bool, part: str, columns: Span) -> Linear:
        """A projection to the residual stream, where the tensor ranks' parts are added up."""
        biases = reader.tensor(f"{part}.bias") if bias and shard.tensor_rank == 0 else None
        return Linear(reader.columns(f"{part}.weight", columns), biases)

    def head_norm(part: str, heads: Span) -> Tensor:
        return reader.tensor(f"{attention}.{part}.weight").expand(heads[1] - heads[0], -1)

    return LayerWeights(
        attention_norm=reader.tensor(f"{name}.input_layernorm.weight"),
        qkv=reads(a.qkv_bias, (f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)),
        qk_norm=torch.cat((head_norm("q_norm", shard.heads), head_norm("k_norm", shard.kv_heads)))
        if a.qk_norm
        else None,
        output=writes(a.output_bias, f"{attention}.o_proj", q),
        mlp_norm=reader.tensor(f"{name}.post_attention_layernorm.weight"),
        gate_up=reads(a.mlp_bias, (f"{mlp}.gate_proj", shard.intermediate), (f"{mlp}.up_proj", shard.intermediate)),
        down=writes(a.mlp_bias, f"{mlp}.down_proj", shard.intermediate),
    )


def _times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


class _Reader:
    """Slices in the dtype and on the device wanted."""

    def __init__(self, stored: dict[str, Stored], dtype: torch.dtype, device: torch.device) -> None:
        self._stored, self._dtype, self._device = stored, dtype, device

    def tensor(self, name: str) -> Tensor:
        return self.rows((name, (0, self._stored[name].shape[0])))

    def rows(self, *parts: tuple[str, Span]) -> Tensor:
        """Rows of tensors of the same width, one below the other; `parts` are (name, rows)."""
        height = sum(last - first for _, (first, last) in parts)
        found = self._empty(height, *self._stored[parts[0][0]].shape[1:])
        row = 0
        for name, (first, last) in parts:
            read_inplace(found[row : row + last - first], self._stored[name], (first, last))
            row += last - first
        return found

    def columns(self, name: str, columns: Span) -> Tensor:
        height = self._stored[name].shape[0]
        found = self._empty(height, columns[1] - columns[0])
        read_inplace(found, self._stored[name], (0, height), columns)
        return found

    def _empty(self, *shape: int) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        # Pages of its own, which go back when it has been packed. What is freed to malloc mostly stays with the
        # process: 77 MB of it for 492 MB of weights.
        pages = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize)
        return torch.frombuffer(pages, dtype=self._dtype).view(shape)
