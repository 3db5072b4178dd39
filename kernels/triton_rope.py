"""Query/key norm, rotary embedding and the write into the KV cache, from a fused qkv row, as one Triton kernel.

Contract   q and k of every row: optionally RMSNorm with a weight per head (rounded before the weight and after it, as
           Qwen3's), then rotated by the row's position, in place, rounded once. k and v of rows with a slot: written
           to the cache as they are, or quantized as `kernels.quantization` does, with their scales. v is not changed.
Layout     qkv [T, Hq + 2 Hkv, D], any strides but D's, which is 1; table [positions, 2, D] contiguous, of which the
           first half of the cosines and the second of the sines are read; one layer of the cache [blocks, Hkv, 2,
           block size, D] and of its scales, by strides. A program is one token and up to 16 heads; a head is held as
           its two halves, which makes the rotation elementwise.
Floor      2 (Hq + Hkv) D values of qkv moved per token, Hkv D read, 2 Hkv D written to the cache, D of the table.
           About 6 FLOPs per value.
Source     arXiv:2104.09864; Qwen3's norm from transformers' `Qwen3Attention`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import rounded
from kernels.triton_quantization import level_of, scale_of

HEADS_PER_PROGRAM = 16
# D / 2 as a power of two -> warps: 8 values of each half per thread, one 128-bit load of 16-bit values
LAUNCH = {16: 1, 32: 2, 64: 4, 128: 8}


@triton.jit
def rope_write_kernel(
    qkv,
    table,
    positions,
    cache,
    scales,
    slots,
    norm,  # [Hq + Hkv, D]; not read without NORM
    heads,
    kv_heads,
    block_size,
    epsilon,
    qkv_token,
    qkv_head,
    cache_block,
    cache_head,
    cache_kind,
    cache_slot,
    scale_block,
    scale_head,
    scale_kind,
    scale_slot,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2, or the next power of two
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    inside = (head[:, None] < heads + 2 * kv_heads) & (at[None, :] < D // 2)
    turns = inside & (head[:, None] < heads + kv_heads)  # queries and keys
    dtype = qkv.dtype.element_ty
    low = qkv + token * qkv_token + head[:, None] * qkv_head + at[None, :]
    x = tl.load(low, inside, 0.0).to(tl.float32)
    y = tl.load(low + D // 2, inside, 0.0).to(tl.float32)
    if NORM:
        weights = norm + head[:, None] * D + at[None, :]
        mean = (tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D
        factor = tl.rsqrt(mean + epsilon)[:, None]
        x_norm = rounded(x * factor, dtype).to(tl.float32) * tl.load(weights, turns, 0.0).to(tl.float32)
        y_norm = rounded(y * factor, dtype).to(tl.float32) * tl.load(weights + D // 2, turns, 0.0).to(tl.float32)
        x = tl.where(turns, rounded(x_norm, dtype).to(tl.float32), x)
        y = tl.where(turns, rounded(y_norm, dtype).to(tl.float32), y)
    angles = table + tl.load(positions + token).to(tl.int64) * (2 * D) + at
    cos = tl.load(angles, at < D // 2, 0.0).to(tl.float32)[None, :]
    sin = tl.load(angles + D + D // 2, at < D // 2, 0.0).to(tl.float32)[None, :]
    first = rounded(tl.where(turns, x * cos - y * sin, x), dtype)
    second = rounded(tl.where(turns, y * cos + x * sin, y), dtype)
    tl.store(low, first, turns)
    tl.store(low + D // 2, second, turns)

    slot = tl.load(slots + token)
    if slot >= 0:
        kind = tl.where(head < heads + kv_heads, 0, 1)
        kv_head = head - heads - kind * kv_heads
        written = inside & (head[:, None] >= heads)
        block, place = (slot // block_size).to(tl.int64), slot % block_size
        row = cache + block * cache_block + kv_head * cache_head + kind * cache_kind + place * cache_slot
        cells = row[:, None] + at[None, :]
        if QUANTIZED:
            stored = cache.dtype.element_ty
            x, y = first.to(tl.float32), second.to(tl.float32)
            scale = scale_of(tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1)), stored)
            scale_row = scales + block * scale_block + kv_head * scale_head + kind * scale_kind + place * scale_slot
            tl.store(scale_row, scale, (head >= heads) & (head < heads + 2 * kv_heads))
            tl.store(cells, level_of(x, scale[:, None], stored), written)
            tl.store(cells + D // 2, level_of(y, scale[:, None], stored), written)
        else:
            tl.store(cells, first, written)
            tl.store(cells + D // 2, second, written)


def rope_write_inplace(
    qkv: Tensor,  # [T, Hq + 2 Hkv, D]
    table: Tensor,  # [positions, 2, D]
    positions: Tensor,  # [T]
    cache: Tensor,  # [blocks, Hkv, 2, block size, D]: one layer
    slots: Tensor,  # [T] int32
    heads: int,
    kv_heads: int,
    qk_norm: Tensor | None,  # [Hq + Hkv, D]
    epsilon: float,
    scales: Tensor | None,  # [blocks, Hkv, 2, block size] fp32
) -> None:
    tokens, all_heads, dim = qkv.shape
    if not tokens:
        return
    half = max(min(LAUNCH), triton.next_power_of_2(dim // 2))
    if half not in LAUNCH:
        raise ValueError(f"heads of {dim} values are too large for this kernel; it takes up to {2 * max(LAUNCH)}")
    rope_write_kernel[(tokens, triton.cdiv(all_heads, HEADS_PER_PROGRAM))](
        qkv,
        table,
        positions,
        cache,
        cache if scales is None else scales,
        slots,
        table if qk_norm is None else qk_norm,
        heads,
        kv_heads,
        cache.shape[3],
        epsilon,
        *qkv.stride()[:2],
        *cache.stride()[:4],
        *(cache.stride()[:4] if scales is None else scales.stride()),
        D=dim,
        HALF=half,
        HEADS=HEADS_PER_PROGRAM,
        NORM=qk_norm is not None,
        QUANTIZED=scales is not None,
        num_warps=LAUNCH[half],
    )
