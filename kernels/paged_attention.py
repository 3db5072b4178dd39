"""Attention over the paged KV cache for one step of a mixed batch: the entry, and what a step must say about itself.

A step is B sequences. The first `decodes` of them have one query each and are cut along their keys (`decode_items`);
the others have any number of queries, and are cut along these (`prefill_tiles`): a prompt's chunk, or a few tokens to
verify. On a GPU, triton_decode and triton_prefill serve the two kinds; on a CPU, a plain form in fp32 that says what
both must give. Nothing is written to the cache, and nothing here knows whose a block is. (The engine on a CPU uses
`kernels.attention`, which is made for that machine.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.backend import uses_triton

CHUNK = 512  # keys of a decode item. Fixed, so that no row's order of summation depends on the rest of its batch
TILE_ROWS = 128  # (query, head of the group) pairs of a prefill tile
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What a step computes: int32 tensors on the cache's device. Every layer of the step uses the same."""

    block_tables: Tensor  # [B, W], block ids in order; what lies outside a sequence's keys is never read
    lengths: Tensor  # [B], keys of the sequence once this step's are written; 0: a padded row
    query_starts: Tensor  # [B + 1], rows of the flat batch; sequence b has rows [starts[b], starts[b + 1])
    decodes: int  # the first so many sequences have one query each: row i is sequence i
    decode_items: Tensor  # [I, 2], (sequence, chunk); from the last start on, padding
    decode_item_starts: Tensor  # [decodes + 1], row i is merged from items [starts[i], starts[i + 1])
    prefill_tiles: Tensor  # [P, 2], (sequence, its first query in the tile); sequence -1: padding


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer of the cache, as views."""

    keys: Tensor  # [blocks, Hkv, block size, D]
    values: Tensor
    key_scales: Tensor | None  # [blocks, Hkv, block size] fp32, of an 8-bit cache
    value_scales: Tensor | None


def decode_items(lengths: Int32) -> tuple[Int32, Int32]:  # [decodes] -> [I, 2], [decodes + 1]
    """The work list of sequences with one query: (sequence, chunk) in order, and where each sequence's items start."""
    counts = -(-lengths // CHUNK)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    chunks = np.arange(starts[-1], dtype=np.int32) - starts[sequences]
    return np.stack((sequences, chunks), 1), starts


def tile_queries(group: int) -> int:
    """Queries of a prefill tile, when `group` query heads share a KV head."""
    return TILE_ROWS // group


def prefill_tiles(lengths: Int32, query_starts: Int32, decodes: int, group: int) -> Int32:  # [B], [B + 1] -> [P, 2]
    """The work list of sequences `decodes` and up. The tile with the most keys is first: started last, it would end
    long after all others."""
    size = tile_queries(group)
    queries = np.diff(query_starts)
    queries[:decodes] = 0
    counts = -(-queries // size)
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    ends = np.cumsum(counts)
    first = (np.arange(counts.sum(), dtype=np.int32) - (ends - counts)[sequences]) * size
    keys = lengths[sequences] - queries[sequences] + np.minimum(first + size, queries[sequences])
    order = np.argsort(-keys, kind="stable")
    return np.stack((sequences, first), 1)[order].astype(np.int32)


def attend(
    q: Tensor,  # [T, Hq, D]; rows and heads may have any stride
    cache: Tensor,  # [blocks, Hkv, layers, 2, block size, D]; cells (head, layer) of a block may lie apart
    layer: int,
    step: PagedStep,
    scale: float,
    window: int,  # a query sees the last `window` keys up to its own; 0: all
    scales: Tensor | None = None,  # [blocks, Hkv, layers, 2, block size] fp32, of an int8 or e4m3 cache
    out: Tensor | None = None,  # [T, Hq * D], rows of any stride
    lse: Tensor | None = None,  # [T, Hq] fp32, contiguous: ln of the sum of exp(scale * q k), to merge results by
) -> Tensor:  # [T, Hq * D]
    """Causal attention of every row that belongs to a sequence. A row without keys gives 0, with lse -inf.

    ValueError: shapes, dtypes or strides that no kernel serves.
    """
    _check(q, cache, scale, scales)
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    layer_cache = LayerCache(
        cache[:, :, layer, 0],
        cache[:, :, layer, 1],
        None if scales is None else scales[:, :, layer, 0],
        None if scales is None else scales[:, :, layer, 1],
    )
    if not uses_triton(q):
        _attend_torch(q, layer_cache, step, scale, window, out, lse)
        return out
    if step.decodes:
        from kernels.triton_decode import decode

        decode(q, layer_cache, step, scale, window, out, lse)
    if len(step.prefill_tiles):
        from kernels.triton_prefill import prefill

        prefill(q, layer_cache, step, scale, window, out, lse)
    return out


def _check(q: Tensor, cache: Tensor, scale: float, scales: Tensor | None) -> None:
    heads, dim = q.shape[1:]
    _, kv_heads, _, _, block_size, cache_dim = cache.shape
    if dim != cache_dim or heads % kv_heads or heads // kv_heads > 16:
        raise ValueError(
            f"{heads} query heads of {dim} do not fit a cache of {kv_heads} heads of {cache_dim}: the sizes must be "
            "equal and 1 to 16 query heads share a KV head"
        )
    if dim > 256 or dim % 16 or block_size % 16 or block_size > 128:
        raise ValueError(
            f"heads of {dim} in blocks of {block_size} tokens: D must be a multiple of 16 up to 256, "
            "the block size a multiple of 16 up to 128"
        )
    tiles = cache.stride()[4:] == (dim, 1) and (scales is None or scales.stride(4) == 1)
    blocks = all(x is None or x.stride(0) >= kv_heads * x.stride(1) for x in (cache, scales))
    if not tiles or not blocks or q.stride(2) != 1:
        raise ValueError(
            "each [block size, D] tile of the cache and the scales of one must be contiguous, each block in one place, "
            "and so must each head of q"
        )
    if (cache.dtype in EIGHT_BITS) != (scales is not None):
        raise ValueError(f"a cache of {cache.dtype} {'has no' if scales is not None else 'needs'} scales")
    if cache.dtype not in EIGHT_BITS and cache.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} but the cache {cache.dtype}: they must be the same unless the cache is 8-bit")
    if scale <= 0:
        raise ValueError(f"the scale is {scale}: it must be positive")


def _attend_torch(
    q: Tensor, cache: LayerCache, step: PagedStep, scale: float, window: int, out: Tensor, lse: Tensor | None
) -> None:
    group = q.shape[1] // cache.keys.shape[1]
    starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
    for sequence, length in enumerate(lengths):
        rows = slice(starts[sequence], starts[sequence + 1])
        table = step.block_tables[sequence]
        k = _gather(cache.keys, cache.key_scales, table, length).repeat_interleave(group, 0)  # [Hq, S, D]
        v = _gather(cache.values, cache.value_scales, table, length).repeat_interleave(group, 0)
        scores = q[rows].float().transpose(0, 1) @ k.transpose(1, 2) * scale  # [Hq, Q, S]
        positions = torch.arange(length - scores.shape[1], length)[:, None]
        visible = torch.arange(length) <= positions
        if window:
            visible &= torch.arange(length) > positions - window
        scores = scores.masked_fill(~visible, -math.inf)
        if lse is not None:
            lse[rows] = scores.logsumexp(-1).T
        weights = scores.softmax(-1)
        out[rows] = (weights @ v).transpose(0, 1).flatten(1).to(out.dtype)


def _gather(tiles: Tensor, scales: Tensor | None, table: Tensor, length: int) -> Tensor:
    """The first `length` keys or values of a sequence: [Hkv, S, D] fp32."""
    blocks = table[: -(-length // tiles.shape[2])].long()
    found = tiles[blocks].float()  # [n, Hkv, block size, D]
    if scales is not None:
        found *= scales[blocks].unsqueeze(-1)
    return found.transpose(0, 1).flatten(1, 2)[:, :length]
