"""Steps for paged attention, and what must come out: random KV in permuted blocks of a cache that is poisoned
everywhere else, and the oracle's answer in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import quantization, reference
from kernels.paged_attention import PagedStep, attend, decode_items, prefill_tiles

LAYERS, LAYER = 2, 1


@dataclass(frozen=True)
class Case:
    q: Tensor  # [T, Hq, D], a view of rows that are longer
    cache: Tensor
    scales: Tensor | None
    step: PagedStep
    keys: list[Tensor]  # per sequence, what the cache holds: [S, Hkv, D]
    values: list[Tensor]

    def run(self, window: int = 0) -> tuple[Tensor, Tensor]:
        """[T, Hq, D] and the log-sum-exp [T, Hq]."""
        tokens, heads, dim = self.q.shape
        out = torch.full((tokens, heads * dim), float("nan"), dtype=self.q.dtype)
        lse = torch.full((tokens, heads), float("nan"))
        found = attend(self.q, self.cache, LAYER, self.step, dim**-0.5, window, self.scales, out, lse)
        assert found is out
        return out.view(tokens, heads, dim), lse

    def expected(self, window: int = 0) -> tuple[Tensor, Tensor]:
        out, lse = torch.zeros(self.q.shape, dtype=torch.float64), torch.full(self.q.shape[:2], -torch.inf).double()
        starts = self.step.query_starts.tolist()
        scale = self.q.shape[2] ** -0.5
        for sequence, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            for row in range(starts[sequence], starts[sequence + 1]):
                seen = len(k) - (starts[sequence + 1] - 1 - row)
                if seen > 0:
                    out[row] = reference.attention(self.q[row], k[:seen], v[:seen], scale, window)
                    lse[row] = reference.attention_lse(self.q[row], k[:seen], scale, window)
        return out, lse

    def check(self, tolerance: float, window: int = 0) -> None:
        """The relative error of every row, in the 2-norm; that of its log-sum-exp is absolute."""
        (found, lse), (expected, expected_lse) = self.run(window), self.expected(window)
        error = (found.double() - expected).flatten(1).norm(dim=1)
        assert (error <= tolerance * expected.flatten(1).norm(dim=1)).all(), error
        torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=0)


def case(
    lengths: list[int],
    queries: list[int],
    decodes: int = 0,
    *,
    group: int = 3,
    kv_heads: int = 1,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    block_size: int = 16,
    seed: int = 0,
    shuffle: int = 0,
    magnitude: float = 1.0,  # of V
) -> Case:
    """Sequences of `lengths` keys, of which the last `queries` are this step's. `seed` and a
    sequence's length make what it computes, `shuffle` where that lies."""
    counts = [-(-length // block_size) for length in lengths]
    cache, scales = _poisoned(sum(counts) + 3, kv_heads, block_size, dim, kv_dtype or dtype)
    # block 0, which a masked load of the table gives, stays poisoned
    free = (1 + np.random.default_rng(shuffle).permutation(len(cache) - 1)).tolist()
    tables = torch.full((len(lengths), max([1, *counts]) + 1), free.pop(), dtype=torch.int32)
    q, keys, values = [], [], []
    for sequence, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + length)
        kv = torch.randn(2, length, kv_heads, dim, generator=generator).to(dtype)
        rows = torch.randn(max(length, count), (group + 2) * kv_heads, dim, generator=generator).to(dtype)
        q.append(rows[len(rows) - count :])
        kv[1] *= magnitude
        blocks = torch.tensor([free.pop() for _ in range(counts[sequence])], dtype=torch.int32)
        tables[sequence, : len(blocks)] = blocks
        k, v = _write(cache, scales, blocks.long(), kv)
        keys.append(k)
        values.append(v)
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    step = step_of(tables, np.array(lengths, np.int32), starts, decodes, group)
    return Case(torch.cat(q)[:, : group * kv_heads], cache, scales, step, keys, values)


def step_of(tables: Tensor, lengths: np.ndarray, starts: np.ndarray, decodes: int, group: int) -> PagedStep:
    items, item_starts = decode_items(lengths[:decodes])
    tiles = prefill_tiles(lengths, starts, decodes, group)
    numbers = [torch.from_numpy(array) for array in (lengths, starts, items, item_starts, tiles)]
    return PagedStep(tables, numbers[0], numbers[1], decodes, *numbers[2:])


def _poisoned(
    blocks: int, kv_heads: int, block_size: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    shape = (blocks, kv_heads, LAYERS, 2, block_size)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full((*shape, dim), float("nan"), dtype=dtype), None
    poison = torch.full((*shape, dim), 127, dtype=torch.int8)  # the code of NaN in e4m3
    return poison.view(dtype), torch.full(shape, float("nan"))


def _write(cache: Tensor, scales: Tensor | None, blocks: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """kv [2, S, Hkv, D] -> what the cache holds of it in fp64, which is less exact in 8 bits."""
    held = kv.double()
    positions = torch.arange(kv.shape[1])
    where, slots = blocks[positions // cache.shape[4]], positions % cache.shape[4]
    raw = cache.view(torch.int8) if scales is not None else cache
    for kind in (0, 1):
        written = kv[kind]
        if scales is not None:
            levels, scale = _quantize(kv[kind], cache.dtype)
            scales[where, :, LAYER, kind, slots] = scale
            held[kind] = levels.double() * scale.double().unsqueeze(-1)
            written = levels.view(torch.int8)
        raw[where, :, LAYER, kind, slots] = written
    return held[0], held[1]


def _quantize(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype is torch.int8:
        return quantization.quantize(values)
    scale = values.float().abs().amax(-1) / 448
    return (values.float() / scale.unsqueeze(-1)).to(dtype), scale
