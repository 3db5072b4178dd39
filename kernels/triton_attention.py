"""The loop that decode and prefill share: a tile of queries against a range of one sequence's keys, in one pass.

Contract  q [M, D] of one KV head's group, keys [begin, end) of the sequence in tiles of TILE. The softmax is the online
          one (arXiv:1805.02867, as in FlashAttention-2, arXiv:2307.08691): a running maximum `top` of the raw scores,
          the running `total` of exp2, and the accumulator in units of both. Tiles start at multiples of TILE counted
          from the sequence's first key, so what a query gets does not depend on where its range begins.
Layout    keys and values are [block size, D] tiles, found through the block table one key at a time, so that block size
          and TILE need not divide one another. Only a MASKED range may contain keys that must not be read.
8 bits    e4m3 is multiplied as fp16 and int8 as bf16, which convert fastest on sm_90. K's scales multiply scores. V's
          multiply weights, which fp16 could not hold if V were small: so they are taken relative to `unit`, the
          largest power of two seen among them, which makes every rescaling exact.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton_math import INTERP, dot, rounded

LOG2_E = 1.4426950408889634
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def compute_type(q: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """What the operands of a multiplication are converted to."""
    if q == torch.float32 or cache == q:
        return TYPES[q]
    return tl.bfloat16 if cache == torch.int8 else tl.float16


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x as an operand of `dot`. The interpreter converts to and from fp32 only; a GPU has better ways."""
    if x.dtype == dtype:
        return x
    else:
        return rounded(x.to(tl.float32), dtype) if INTERP else x.to(dtype)


@triton.jit
def load_rows(tiles, offsets, stored, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [len(offsets), D_PAD], 0 where not stored and beyond D."""
    dims = tl.arange(0, D_PAD)
    pointers = tiles + offsets[:, None] + dims[None, :]
    if MASKED:
        return tl.load(pointers, mask=stored[:, None] & (dims < D)[None, :], other=0.0)
    else:
        return tl.load(pointers) if D == D_PAD else tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def attend_range(
    q,  # [M, D_PAD], of type COMPUTE
    accumulator,  # [M, D_PAD] fp32
    top,  # [M] fp32
    total,  # [M] fp32
    unit,  # fp32, what the accumulator is multiplied by in the end
    keys,  # of the KV head
    values,
    key_scales,  # of the KV head, or None
    value_scales,
    table,  # of the sequence
    begin,  # a multiple of TILE
    end,
    low,  # keys [low, high) may be read
    high,
    first,  # [M], each query sees keys first to last
    last,
    block_stride,
    scale_stride,
    scale_log2,
    M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
):
    for start in range(begin, end, TILE):
        columns = start + tl.arange(0, TILE)
        stored = (columns >= low) & (columns < high)
        entries = table + columns // BLOCK
        blocks = (tl.load(entries, mask=stored, other=0) if MASKED else tl.load(entries)).to(tl.int64)
        offsets = blocks * block_stride + columns % BLOCK * D
        k = operand(load_rows(keys, offsets, stored, D, D_PAD, MASKED), COMPUTE)
        scores = dot(q, tl.trans(k), tl.zeros([M, TILE], tl.float32))
        if key_scales is not None:
            scale_offsets = blocks * scale_stride + columns % BLOCK
            scores *= tl.load(key_scales + scale_offsets, mask=stored, other=0.0)[None, :]
        if MASKED:
            visible = (columns[None, :] >= first[:, None]) & (columns[None, :] <= last[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # a query that has seen no key yet has no maximum to subtract
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * scale_log2)
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        shrink = tl.exp2(top * scale_log2 - shift)
        top = new_top
        total = total * shrink + tl.sum(weights, 1)
        if value_scales is not None:
            value_scale = tl.load(value_scales + scale_offsets, mask=stored, other=0.0)
            largest = tl.maximum(unit, power_of_two(tl.max(value_scale, 0)))
            shrink *= unit / largest
            weights *= (value_scale / largest)[None, :]
            unit = largest
        v = operand(load_rows(values, offsets, stored, D, D_PAD, MASKED), COMPUTE)
        accumulator = dot(rounded(weights, COMPUTE), v, accumulator * shrink[:, None])
    return accumulator, top, total, unit


@triton.jit
def power_of_two(x):
    """The largest power of two up to x >= 0: fp32 without its mantissa."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
