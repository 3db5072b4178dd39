"""Paged attention for sequences with more than one query: a prompt's chunk, or 1 + k tokens to verify.

Contract  the queries of a sequence are its last ones, and each sees the keys up to its own position, or the last
          `window` of them. The keys of this step are in the cache already, so a prefix hit, a later chunk and a first
          chunk are one case. A program takes a tile of one sequence's queries for one KV head; tiles with most keys
          come first.
Layout    a tile of the list is 128 rows: 128 // G queries times the G query heads of the KV head; a program takes M of
          them. It walks the keys in three stretches: those that only some of its queries see because of the window,
          those that all see, which need no masks, and the diagonal.
Floor     FLOP: 4 * Hq * D * (sum over queries of the keys each sees); bytes hardly matter from 128 queries on. Without
          overlap of softmax and multiplication, which takes warp specialisation, 56 % of the tensor cores' rate (by
          counting sm_90's instructions).
Source    arXiv:2307.08691 (FlashAttention-2); arXiv:2309.06180 (paged KV).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_attention import TILE_ROWS, LayerCache, PagedStep
from kernels.triton_attention import LOG2_E, attend_range, compute_type, operand
from kernels.triton_math import rounded

# (D, padded to a power of two; bytes per element of the cache): rows and keys of a multiplication, warps, buffers of
# the loads. 4 warps per 64 rows is what the accumulator's registers ask for, and fp32 has no tensor cores.
CONFIGURATIONS: dict[tuple[int, int], dict[str, int]] = {
    (64, 1): {"M": 128, "TILE": 64, "num_warps": 8, "num_stages": 3},
    (64, 2): {"M": 128, "TILE": 64, "num_warps": 8, "num_stages": 3},
    (64, 4): {"M": 64, "TILE": 32, "num_warps": 8, "num_stages": 2},
    (128, 1): {"M": 128, "TILE": 32, "num_warps": 8, "num_stages": 3},
    (128, 2): {"M": 128, "TILE": 64, "num_warps": 8, "num_stages": 3},
    (128, 4): {"M": 32, "TILE": 16, "num_warps": 8, "num_stages": 2},
    (256, 1): {"M": 64, "TILE": 32, "num_warps": 8, "num_stages": 3},
    (256, 2): {"M": 64, "TILE": 32, "num_warps": 8, "num_stages": 3},
    (256, 4): {"M": 32, "TILE": 16, "num_warps": 8, "num_stages": 2},
}
# these vary from step to step, or point anywhere into the step's metadata: no variant of the kernel for each
VARYING = ["window", "table_stride", "tables", "lengths", "query_starts", "tiles"]


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)
def _prefill(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    out,
    lse,
    tables,
    lengths,
    query_starts,
    tiles,
    window,
    table_stride,
    q_stride,
    q_head_stride,
    out_stride,
    block_stride,
    head_stride,
    scale_stride,
    scale_head_stride,
    scale_log2,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    kv_head = tl.program_id(0) // (TILE_ROWS // M)
    part = tl.program_id(0) % (TILE_ROWS // M)
    sequence = tl.load(tiles + 2 * tl.program_id(1))
    if sequence < 0:
        return
    tile_query = tl.load(tiles + 2 * tl.program_id(1) + 1)
    row_start = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - row_start
    first_query = tile_query + part * M // GROUP
    if first_query >= queries:
        return
    last_query = tl.minimum(tile_query + tl.minimum((part * M + M - 1) // GROUP, TILE_ROWS // GROUP - 1), queries - 1)

    members = part * M + tl.arange(0, M)
    dims = tl.arange(0, D_PAD)
    query = tile_query + members // GROUP
    heads = kv_head * GROUP + members % GROUP
    used = query <= last_query
    cells = used[:, None] & (dims < D)[None, :]
    rows = (row_start + query).to(tl.int64)
    q_offsets = rows[:, None] * q_stride + heads[:, None] * q_head_stride + dims[None, :]
    q_tile = tl.load(q + q_offsets, mask=cells, other=0.0)

    # Key positions. A query sees keys `first` to `last`; all of the program's see the whole tiles between two of these.
    context = tl.load(lengths + sequence) - queries  # keys from before this step
    last = context + query
    low = tl.maximum(context + first_query - window + 1, 0) if WINDOWED else 0
    high = context + last_query + 1
    begin = low // TILE * TILE
    whole_end = tl.maximum((context + first_query + 1) // TILE * TILE, begin)
    whole_begin = begin
    first = tl.zeros([M], tl.int32)
    if WINDOWED:
        first = last - window + 1
        whole_begin = tl.minimum((tl.maximum(high - window, 0) + TILE - 1) // TILE * TILE, whole_end)

    q_tile = operand(q_tile, COMPUTE)
    accumulator = tl.zeros([M, D_PAD], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    unit = tl.full([], 1.0 if key_scales is None else 2.0**-64, tl.float32)
    keys += kv_head * head_stride
    values += kv_head * head_stride
    if key_scales is not None:
        key_scales += kv_head * scale_head_stride
        value_scales += kv_head * scale_head_stride
    table = tables + sequence.to(tl.int64) * table_stride
    for stretch in tl.static_range(0 if WINDOWED else 1, 3):
        accumulator, top, total, unit = attend_range(
            q_tile,
            accumulator,
            top,
            total,
            unit,
            keys,
            values,
            key_scales,
            value_scales,
            table,
            begin if stretch == 0 else whole_begin if stretch == 1 else whole_end,
            whole_begin if stretch == 0 else whole_end if stretch == 1 else high,
            low,
            high,
            first,
            last,
            block_stride,
            scale_stride,
            scale_log2,
            M,
            TILE,
            BLOCK,
            D,
            D_PAD,
            COMPUTE,
            stretch != 1,
        )
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    result = rounded(accumulator * (unit / divisor)[:, None], out.dtype.element_ty)
    tl.store(out + rows[:, None] * out_stride + heads[:, None] * D + dims[None, :], result, mask=cells)
    if lse is not None:
        sums = tl.where(seen, top * scale_log2 + tl.log2(divisor), float("-inf")) * 0.6931471805599453
        tl.store(lse + rows * (tl.num_programs(0) // (TILE_ROWS // M) * GROUP) + heads, sums, mask=used)


def prefill(
    q: Tensor, cache: LayerCache, step: PagedStep, scale: float, window: int, out: Tensor, lse: Tensor | None
) -> None:
    """The rows of `out` [T, Hq * D], and of `lse` [T, Hq] where there is one, that the step's tiles are made of."""
    scales = cache.key_scales
    constants = prefill_constants(q, cache, window)
    _prefill[(cache.keys.shape[1] * TILE_ROWS // constants["M"], len(step.prefill_tiles))](
        q,
        cache.keys,
        cache.values,
        scales,
        cache.value_scales,
        out,
        lse,
        step.block_tables,
        step.lengths,
        step.query_starts,
        step.prefill_tiles,
        window,
        step.block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        cache.keys.stride(0),
        cache.keys.stride(1),
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        scale * LOG2_E,
        **constants,
    )


def prefill_constants(q: Tensor, cache: LayerCache, window: int) -> dict[str, Any]:
    """What a variant of `_prefill` is compiled for, beside the types of its arguments."""
    kv_heads, block_size, dim = cache.keys.shape[1:]
    padded = max(64, triton.next_power_of_2(dim))
    configuration = CONFIGURATIONS[padded, cache.keys.element_size()]
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
        # without wgmma the queries are in registers too, which leaves less room for scores
        configuration = configuration | {"TILE": min(32, configuration["TILE"])}
    return {
        "WINDOWED": window > 0,
        "GROUP": q.shape[1] // kv_heads,
        "TILE_ROWS": TILE_ROWS,
        "BLOCK": block_size,
        "D": dim,
        "D_PAD": padded,
        "COMPUTE": compute_type(q.dtype, cache.keys.dtype),
        **configuration,
    }
