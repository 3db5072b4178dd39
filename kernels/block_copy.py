"""Whole blocks of a KV cache gathered into a contiguous run, and scattered back: what handoff and preemption move.

Nothing is converted: a block is its bytes, in the canonical order in which the cache has them. Which block is whose,
and when a copy may be read, is the caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import uses_triton


def gather_blocks(cache: Tensor, ids: Tensor, out: Tensor, programs: int = 0) -> None:
    """out[i] = cache[ids[i]].  cache [blocks, ...], ids [N] int32, out [N, elements of a block], of the cache's dtype.

    `programs` limits how much of a GPU takes part (0: all of it); a CPU does not ask.
    """
    source, target = _words(cache, ids, out)
    if uses_triton(cache):
        from kernels.triton_block_copy import copy_blocks

        copy_blocks(source, ids, target, True, programs)
    else:
        torch.index_select(source, 0, ids, out=target)


def scatter_blocks(cache: Tensor, ids: Tensor, source: Tensor, programs: int = 0) -> None:
    """cache[ids[i]] = source[i], the reverse of `gather_blocks`. An id occurs at most once."""
    target, run = _words(cache, ids, source)
    if uses_triton(cache):
        from kernels.triton_block_copy import copy_blocks

        copy_blocks(target, ids, run, False, programs)
    else:
        target.index_copy_(0, ids.long(), run)


def _words(cache: Tensor, ids: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
    """Both as rows of 4-byte words, or of bytes where a block's size is not a multiple. Raises ValueError."""
    elements = cache[0].numel() if len(cache) else 0
    if run.dtype != cache.dtype or run.shape != (len(ids), elements):
        raise ValueError(
            f"a run of {len(ids)} blocks must be [{len(ids)}, {elements}] of {cache.dtype}, "
            f"not {[*run.shape]} of {run.dtype}"
        )
    if not cache.is_contiguous() or not run.is_contiguous():
        raise ValueError(
            "the cache and the run of blocks must be contiguous; pass whole tensors, not slices of columns"
        )
    word = torch.uint8 if elements * cache.itemsize % 4 else torch.int32
    return cache.view(len(cache), -1).view(word), run.view(word)
