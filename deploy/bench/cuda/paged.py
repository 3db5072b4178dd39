"""A paged KV cache with random content, and the metadata of a step against it.

As the engine has them: one tensor [blocks, kv heads, layers, 2, block size, D] and block tables in no order. The layers
serve as different inputs of one call: what a model's next layer reads is not in the cache either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.paged_attention import PagedStep, decode_items, prefill_tiles

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
RANDOM_ELEMENTS = 2**28  # made at a time


@dataclass(frozen=True, slots=True)
class Heads:
    """Hq query heads share Hkv key-value heads of D dimensions."""

    queries: int
    keys: int
    dim: int

    def __str__(self) -> str:
        return f"{self.queries}/{self.keys}x{self.dim}"


@dataclass(frozen=True, slots=True)
class Paged:
    cache: Tensor
    scales: Tensor | None  # [blocks, kv heads, layers, 2, block size] of an 8-bit cache
    step: PagedStep


def paged(
    lengths: Sequence[int],  # keys of each sequence
    queries: Sequence[int],  # of each sequence; sequences with one come first
    heads: Heads,
    block_size: int,
    layers: int,
    dtype: torch.dtype,  # of the cache
) -> Paged:
    counts = [-(-length // block_size) for length in lengths]
    blocks = sum(counts)
    shape = (blocks, heads.keys, layers, 2, block_size, heads.dim)
    cache = torch.empty(shape, dtype=dtype, device="cuda")
    _fill_inplace(cache)
    scales = None
    if dtype in EIGHT_BITS:
        scales = torch.rand(shape[:-1], device="cuda") + 0.5
        scales *= 1 / 64 if dtype is torch.int8 else 1.0
    return Paged(cache, scales, _step(lengths, queries, counts, blocks, heads.queries // heads.keys))


def _fill_inplace(cache: Tensor) -> None:
    flat = cache.view(-1)
    for first in range(0, flat.numel(), RANDOM_ELEMENTS):
        part = flat[first : first + RANDOM_ELEMENTS]
        if cache.dtype is torch.int8:
            part.random_(-127, 128)
        elif cache.dtype in EIGHT_BITS:
            part.copy_(torch.randn(part.shape, device="cuda"))
        else:
            part.normal_()


def _step(lengths: Sequence[int], queries: Sequence[int], counts: Sequence[int], blocks: int, group: int) -> PagedStep:
    order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    tables = np.zeros((len(lengths), max(counts)), np.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[first : first + count]
        first += count
    decodes = sum(query == 1 for query in queries)
    items, starts = decode_items(np.asarray(lengths[:decodes], np.int32))
    query_starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tiles = prefill_tiles(np.asarray(lengths, np.int32), query_starts, decodes, group)
    return PagedStep(
        block_tables=_device(tables),
        lengths=_device(lengths),
        query_starts=_device(query_starts),
        decodes=decodes,
        decode_items=_device(items),
        decode_item_starts=_device(starts),
        prefill_tiles=_device(tiles),
    )


def _device(values: object) -> Tensor:
    return torch.tensor(np.asarray(values, np.int32).tolist(), dtype=torch.int32, device="cuda")


def attended(q: Tensor, paged: Paged, layer: int, row: int, sequence: int, position: int, scale: float) -> Tensor:
    """The reference: [Hq, D] in fp32, of the query in `row`, which sees the keys up to its own position."""
    cache = paged.cache
    kv_heads, block_size, dim = cache.shape[1], cache.shape[4], cache.shape[5]
    keys = position + 1
    blocks = paged.step.block_tables[sequence, : -(-keys // block_size)].long()
    kv = cache[blocks][:, :, layer].float()  # [blocks, Hkv, 2, block size, D]
    if paged.scales is not None:
        kv = kv * paged.scales[blocks][:, :, layer].unsqueeze(-1)
    k, v = kv.permute(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, dim)[:, :, :keys].unbind()
    scores = torch.einsum("hgd,hsd->hgs", q[row].float().view(kv_heads, -1, dim), k) * scale
    return torch.einsum("hgs,hsd->hgd", scores.softmax(-1), v).reshape(-1, dim)
