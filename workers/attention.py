"""What a layer does between its projections: rotate queries and keys, write keys and values, attend. Two ways to the
same numbers: over segments that were gathered for the step (the CPU's), or by kernels that walk the block tables.

Made once per step, called once per layer. Which rows there are and what they see is in the step's batch; projections,
norms of the residual stream and sums over ranks are the decoder's. Tensor letters as in kernels/reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.attention import Segment, paged_attention, write_kv_inplace
from kernels.norm_rope import rms_norm, rope_inplace, rope_write_inplace
from kernels.paged_attention import PagedStep, attend
from workers.cache import KvCache


@dataclass(frozen=True, slots=True)
class Geometry:
    """Of the attention of one shard's layers."""

    heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D
    epsilon: float  # of the norm of queries and keys, where there is one
    windows: tuple[int, ...]  # layer of the stage -> tokens a query sees, itself included; 0: all before it

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class Attention(Protocol):
    """Of one step."""

    def __call__(
        self,
        layer: int,  # within the stage
        qkv: Tensor,  # [T, (Hq + 2 Hkv) * D], which is overwritten
        qk_norm: Tensor | None,  # [Hq + Hkv, D]
    ) -> Tensor:  # [T, Hq * D]
        """Fills the step's slots of the layer's cache on the way."""
        ...


class SegmentAttention:
    """On the CPU. `segments` are per sliding window, `write_rows` as in `workers.batch`."""

    def __init__(
        self,
        geometry: Geometry,
        rope_table: Tensor,  # [max context, 2, D]
        cache: KvCache,
        positions: Tensor,  # [T]
        write_rows: Tensor,  # [T * 2 * Hkv]
        segments: Mapping[int, tuple[Segment, ...]],
    ) -> None:
        self._geometry, self._cache = geometry, cache
        self._write_rows, self._segments = write_rows, segments
        self._cos, self._sin = rope_table.index_select(0, positions).unbind(1)  # [T, D]

    def __call__(self, layer: int, qkv: Tensor, qk_norm: Tensor | None) -> Tensor:
        g = self._geometry
        qkv = qkv.view(qkv.shape[0], -1, g.head_dim)  # [T, Hq + 2 Hkv, D]
        qk = qkv[:, : g.heads + g.kv_heads]
        if qk_norm is not None:
            qk.copy_(rms_norm(qk, qk_norm, g.epsilon))
        rope_inplace(qk, self._cos, self._sin)
        write_kv_inplace(self._cache.token_rows[layer], self._write_rows, qkv[:, g.heads :])
        segments = self._segments[g.windows[layer]]
        return paged_attention(qkv[:, : g.heads], self._cache.block_rows[layer], segments, g.kv_heads, g.scale)


class KernelAttention:
    """On a GPU: two kernels, and a merge where sequences are long. Reads nothing back, so a graph can hold it."""

    def __init__(
        self,
        geometry: Geometry,
        rope_table: Tensor,  # [max context, 2, D]
        cache: KvCache,
        positions: Tensor,  # [T] int32
        slots: Tensor,  # [T] int32: block * block size + place in it; -1: write nothing
        step: PagedStep,
    ) -> None:
        self._geometry, self._rope_table, self._cache = geometry, rope_table, cache
        self._positions, self._slots, self._step = positions, slots, step

    def __call__(self, layer: int, qkv: Tensor, qk_norm: Tensor | None) -> Tensor:
        g = self._geometry
        qkv = qkv.view(qkv.shape[0], -1, g.head_dim)  # [T, Hq + 2 Hkv, D]
        rope_write_inplace(
            qkv, self._rope_table, self._positions, self._cache.values, layer, self._slots,
            g.heads, g.kv_heads, qk_norm, g.epsilon, self._cache.scales,
        )  # fmt: skip
        cache = self._cache
        return attend(qkv[:, : g.heads], cache.values, layer, self._step, g.scale, g.windows[layer], cache.scales)
