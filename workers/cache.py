"""The paged KV cache of one shard: a single tensor, and the views of it that layers and transfers use.

[blocks, kv heads, layers, 2, block size, D], so that a block's bytes are contiguous in the canonical order of
`kvstore.layout`. Which block belongs to whom is the engine's business.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.attention import block_rows, token_rows
from kvstore.layout import Layout


class KvCache:
    def __init__(self, layout: Layout, num_blocks: int, device: torch.device) -> None:
        """`layout` is that of the shard's part of a block."""
        shape = (num_blocks, layout.heads, layout.layers, 2, layout.tokens, layout.dim)
        self.blocks = torch.empty(shape, dtype=getattr(torch, layout.dtype), device=device)
        self.block_rows = block_rows(self.blocks)  # layer -> [rows, block size * D]
        self.token_rows = token_rows(self.blocks)  # layer -> [rows, D]

    def clear(self, block_ids: Tensor) -> None:  # [N]
        if block_ids.numel():
            self.blocks.index_fill_(0, block_ids, 0)

    def bytes_of(self, block: int) -> npt.NDArray[np.uint8]:
        """A writable view of one block [layout.block_bytes]. Only on the CPU: elsewhere there is no such view."""
        view: npt.NDArray[np.uint8] = self.blocks[block].view(-1).view(torch.uint8).numpy()
        return view
