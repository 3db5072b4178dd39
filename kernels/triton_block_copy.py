"""Whole blocks between their places in the KV cache and a contiguous run, as one Triton kernel for both directions.

Contract   run[i] = cache[ids[i]], or cache[ids[i]] = run[i]; bytes, whatever they mean. Ids must be of blocks that
           exist, and in a scatter each must occur once.
Layout     cache [blocks, words], run [N, words], contiguous, both as words of 4 bytes (1 where a block's size is odd).
           `programs` limits how many programs take turns at the tiles, so that a copy can run beside computation and
           leave it most of the GPU; 0 is one per tile.
Floor      2 bytes moved per byte of the blocks. No arithmetic.
Source     Why not one memcpy per block: batched copies of less than 28 KiB reach a tenth of the bus (vLLM #42212).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"block": 4096, "num_warps": 4}  # words: eight 128-bit loads in flight per thread


@triton.jit(do_not_specialize=["tiles"])  # a number of blocks that is new must not compile anything
def copy_blocks_kernel(cache, ids, run, words, tiles, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    tiles_per_block = tl.cdiv(words, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        index = tile // tiles_per_block
        at = (tile % tiles_per_block) * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        in_cache = cache + tl.load(ids + index).to(tl.int64) * words + at
        in_run = run + index.to(tl.int64) * words + at
        if GATHER:
            tl.store(in_run, tl.load(in_cache, inside), inside)
        else:
            tl.store(in_cache, tl.load(in_run, inside), inside)


def copy_blocks(cache: Tensor, ids: Tensor, run: Tensor, gather: bool, programs: int) -> None:
    """cache [blocks, words], ids [N] int32, run [N, words]."""
    words, block = cache.shape[1], LAUNCH["block"]
    tiles = len(ids) * triton.cdiv(words, block)
    if not tiles:
        return
    grid = min(programs or tiles, tiles)
    copy_blocks_kernel[(grid,)](
        cache, ids, run, words, tiles, BLOCK=block, GATHER=gather, num_warps=LAUNCH["num_warps"]
    )
