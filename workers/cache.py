"""The paged KV cache of one shard: a single tensor, and the views of it that layers and transfers use.

A block's bytes are contiguous, in the canonical order of `kvstore.layout`: [kv heads, layers] cells of keys and values,
in 8 bits with their scales behind them in the same cell. So what is copied is bytes, whatever they mean, and a copy of
a block is never without its scales. Which block belongs to whom is the engine's business.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.attention import block_rows, token_rows
from kvstore.layout import Layout


class KvCache:
    """`blocks` is all of it, a row per block. `values` [blocks, kv heads, layers, 2, block size, D] and, in 8 bits,
    `scales` [blocks, kv heads, layers, 2, block size] fp32 are views of it."""

    def __init__(self, layout: Layout, num_blocks: int, device: torch.device) -> None:
        """`layout` is that of the shard's part of a block."""
        cells, dtype = (num_blocks, layout.heads, layout.layers), getattr(torch, layout.dtype)
        tiles = (2, layout.tokens, layout.dim)
        self.scales: Tensor | None = None
        if not layout.scaled:
            self.blocks = self.values = torch.empty((*cells, *tiles), dtype=dtype, device=device)
            return
        levels = 2 * layout.tokens * layout.dim  # bytes of a cell before its scales
        # kernels read 16 bytes at a time: with block sizes that they serve, cells are multiples of 128 bytes
        self.blocks = torch.empty((*cells, layout.cell_bytes), dtype=torch.uint8, device=device)
        self.values = self.blocks[..., :levels].view(dtype).unflatten(-1, tiles)
        self.scales = self.blocks[..., levels:].view(torch.float32).unflatten(-1, tiles[:2])

    @cached_property
    def block_rows(self) -> list[Tensor]:
        """Layer -> [rows, block size * D], as `kernels.attention` wants it, which knows no 8 bits."""
        return block_rows(self.values)

    @cached_property
    def token_rows(self) -> list[Tensor]:
        """Layer -> [rows, D]; as `block_rows`."""
        return token_rows(self.values)

    def clear(self, block_ids: Tensor) -> None:  # [N]
        if block_ids.numel():
            self.blocks.index_fill_(0, block_ids, 0)

    def bytes_of(self, block: int) -> npt.NDArray[np.uint8]:
        """A writable view of one block [layout.block_bytes]. Only on the CPU: elsewhere there is no such view."""
        view: npt.NDArray[np.uint8] = self.blocks[block].view(-1).view(torch.uint8).numpy()
        return view
