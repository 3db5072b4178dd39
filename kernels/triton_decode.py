"""Paged decode attention, split along the keys, and the merge of the parts (FlashDecoding; FlashInfer's work list).

Contract  row i < decodes of q attends to all keys of sequence i, or to its last `window`. A work item is (sequence,
          chunk of 512 keys) for one KV head: it leaves a normalised partial result and its log-sum-exp, and `_merge`
          weighs a row's parts. The chunk's size is fixed, so a row's result is the same bits in any batch. The grid
          depends on capacities only: programs walk a list whose length they read on the device, so that a CUDA graph
          can replay it.
Layout    q [T, Hq, D] by strides; cache tiles [block size, D]; partials [I, Hq, D] and their lse [I, Hq], fp32. The G
          query heads of a KV head are rows of one multiplication, padded to mma.sync's 16: far from its limit here.
Floor     bytes: keys * Hkv * (2 D * element, and 8 of scales if 8-bit) + 4 T Hq D; partials add 4 G / (512 * element),
          1.6 % at G = 4 in bf16. FLOP: 4 * keys * Hq * D, which is 2 G / element per byte: memory bound.
Source    arXiv:2307.08691 (FlashAttention-2) and the FlashDecoding note, arXiv:2501.01005 (FlashInfer: work lists).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_attention import CHUNK, LayerCache, PagedStep
from kernels.triton_attention import LOG2_E, attend_range, compute_type, operand
from kernels.triton_math import rounded

PROGRAMS_PER_PROCESSOR = 8  # about twice what fits at once, so that the last ones even out
INTERPRETED_PROGRAMS = 3  # in the interpreter, which has no processors: fewer than there are items
# (D, padded to a power of two; bytes per element of the cache): keys per step of the loop, warps, buffers of the loads
CONFIGURATIONS: dict[tuple[int, int], dict[str, int]] = {
    (64, 1): {"TILE": 64, "num_warps": 4, "num_stages": 3},
    (64, 2): {"TILE": 64, "num_warps": 4, "num_stages": 5},
    (64, 4): {"TILE": 64, "num_warps": 4, "num_stages": 3},
    (128, 1): {"TILE": 32, "num_warps": 4, "num_stages": 5},
    (128, 2): {"TILE": 64, "num_warps": 4, "num_stages": 5},
    (128, 4): {"TILE": 32, "num_warps": 4, "num_stages": 3},
    (256, 1): {"TILE": 32, "num_warps": 4, "num_stages": 3},
    (256, 2): {"TILE": 32, "num_warps": 4, "num_stages": 3},
    (256, 4): {"TILE": 32, "num_warps": 8, "num_stages": 2},
}
MERGE = {"PARTS": 16, "num_warps": 4}
# these vary from step to step, or point anywhere into the step's metadata: no variant of the kernel for each
VARYING = ["rows", "window", "table_stride", "tables", "lengths", "items", "item_starts"]


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)
def _decode(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    partials,
    partial_lse,
    tables,
    lengths,
    items,
    item_starts,
    rows,
    window,
    table_stride,
    q_stride,
    q_head_stride,
    block_stride,
    head_stride,
    scale_stride,
    scale_head_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    members = tl.arange(0, M)
    dims = tl.arange(0, D_PAD)
    cells = (members < GROUP)[:, None] & (dims < D)[None, :]
    work_items = tl.load(item_starts + rows) * KV_HEADS
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        item = work // KV_HEADS
        kv_head = work % KV_HEADS  # neighbours read neighbouring memory: a block has its heads side by side
        sequence = tl.load(items + 2 * item)
        chunk = tl.load(items + 2 * item + 1)
        length = tl.load(lengths + sequence)
        low = tl.maximum(chunk * CHUNK, tl.where(window > 0, length - window, 0))
        high = tl.minimum(chunk * CHUNK + CHUNK, length)  # not above `low` where the window has left the chunk
        heads = kv_head * GROUP + members
        q_offsets = sequence.to(tl.int64) * q_stride + heads[:, None] * q_head_stride + dims[None, :]
        accumulator, top, total, unit = attend_range(
            operand(tl.load(q + q_offsets, mask=cells, other=0.0), COMPUTE),
            tl.zeros([M, D_PAD], tl.float32),
            tl.full([M], float("-inf"), tl.float32),
            tl.zeros([M], tl.float32),
            tl.full([], 1.0 if key_scales is None else 2.0**-64, tl.float32),
            keys + kv_head * head_stride,
            values + kv_head * head_stride,
            None if key_scales is None else key_scales + kv_head * scale_head_stride,
            None if value_scales is None else value_scales + kv_head * scale_head_stride,
            tables + sequence.to(tl.int64) * table_stride,
            low // TILE * TILE,
            high,
            low,
            high,
            low + tl.zeros([M], tl.int32),
            high - 1 + tl.zeros([M], tl.int32),
            block_stride,
            scale_stride,
            scale_log2,
            M,
            TILE,
            BLOCK,
            D,
            D_PAD,
            COMPUTE,
            True,
        )
        seen = total > 0
        divisor = tl.where(seen, total, 1.0)
        places = (item * (KV_HEADS * GROUP) + heads).to(tl.int64)
        tl.store(partials + places[:, None] * D + dims[None, :], accumulator * (unit / divisor)[:, None], mask=cells)
        lse = tl.where(seen, top * scale_log2 + tl.log2(divisor), float("-inf"))
        tl.store(partial_lse + places, lse, mask=members < GROUP)


@triton.jit(do_not_specialize=["item_starts"], do_not_specialize_on_alignment=["item_starts"])
def _merge(
    partials,
    partial_lse,
    item_starts,
    out,
    lse,
    out_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    dims = tl.arange(0, D_PAD)
    end = tl.load(item_starts + row + 1)
    accumulator = tl.zeros([D_PAD], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(tl.load(item_starts + row), end, PARTS):
        parts = start + tl.arange(0, PARTS)
        places = parts.to(tl.int64) * heads + head
        part_lse = tl.load(partial_lse + places, mask=parts < end, other=float("-inf"))
        cells = (parts < end)[:, None] & (dims < D)[None, :]
        part = tl.load(partials + places[:, None] * D + dims[None, :], mask=cells, other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(part_lse - shift)
        shrink = tl.exp2(top - shift)
        top = new_top
        total = total * shrink + tl.sum(weights, 0)
        accumulator = accumulator * shrink + tl.sum(part * weights[:, None], 0)
    divisor = tl.where(total > 0, total, 1.0)
    result = rounded(accumulator / divisor, out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * out_stride + head * D + dims, result, mask=dims < D)
    if lse is not None:
        tl.store(lse + row * heads + head, (top + tl.log2(divisor)) * 0.6931471805599453)


def decode(
    q: Tensor, cache: LayerCache, step: PagedStep, scale: float, window: int, out: Tensor, lse: Tensor | None
) -> None:
    """Rows [0, decodes) of `out` [T, Hq * D] and, where there is one, `lse` [T, Hq]."""
    heads, dim = q.shape[1:]
    capacity = len(step.decode_items)
    partials = torch.empty(capacity, heads, dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(capacity, heads, dtype=torch.float32, device=q.device)
    constants = decode_constants(q, cache)
    scales = cache.key_scales
    if capacity:
        _decode[(min(capacity * constants["KV_HEADS"], programs(q.device)),)](
            q,
            cache.keys,
            cache.values,
            scales,
            cache.value_scales,
            partials,
            partial_lse,
            step.block_tables,
            step.lengths,
            step.decode_items,
            step.decode_item_starts,
            step.decodes,
            window,
            step.block_tables.stride(0),
            q.stride(0),
            q.stride(1),
            cache.keys.stride(0),
            cache.keys.stride(1),
            0 if scales is None else scales.stride(0),
            0 if scales is None else scales.stride(1),
            scale * LOG2_E,
            **constants,
        )
    _merge[(step.decodes, heads)](
        partials, partial_lse, step.decode_item_starts, out, lse, out.stride(0), **merge_constants(dim)
    )


def decode_constants(q: Tensor, cache: LayerCache) -> dict[str, Any]:
    """What a variant of `_decode` is compiled for, beside the types of its arguments."""
    kv_heads, block_size, dim = cache.keys.shape[1:]
    padded = max(64, triton.next_power_of_2(dim))
    return {
        "KV_HEADS": kv_heads,
        "GROUP": q.shape[1] // kv_heads,
        "M": 16,
        "CHUNK": CHUNK,
        "BLOCK": block_size,
        "D": dim,
        "D_PAD": padded,
        "COMPUTE": compute_type(q.dtype, cache.keys.dtype),
        **CONFIGURATIONS[padded, cache.keys.element_size()],
    }


def merge_constants(dim: int) -> dict[str, Any]:
    return {"D": dim, "D_PAD": max(64, triton.next_power_of_2(dim)), **MERGE}


@functools.cache
def programs(device: torch.device) -> int:
    """Of a decode launch, at most."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_PROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)
