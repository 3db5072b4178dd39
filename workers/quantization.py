"""Blocks of a worker's KV cache in half, or a quarter, of their bytes: how they lie in an int8 tier.

The canonical order stays, cell by cell; only what is in a cell changes (`kvstore.layout`). What comes back is close to
what went in and not equal, so whoever wants exact KV must not be given it: that is decided by the hash root, which is
another one for requests that accept approximate KV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantization import dequantize, quantize
from kvstore.copying import Block
from kvstore.layout import Layout


class Int8Codec:
    """`layout` is the worker's, `stored` the tier's."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.stored = layout.int8
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._levels = 2 * layout.tokens * layout.dim  # bytes of a cell before its scales

    def encode(self, block: Block) -> Block:  # [layout.block_bytes] -> [stored.block_bytes]
        levels, scales = quantize(self._values(block))
        cells = self.layout.cells
        parts = (levels.view(cells, -1).view(torch.uint8), scales.view(cells, -1).view(torch.uint8))
        encoded: Block = torch.cat(parts, dim=1).view(-1).numpy()
        return encoded

    def decode(self, stored: Block, block: Block) -> None:  # [stored.block_bytes] into [layout.block_bytes]
        cells = torch.from_numpy(stored).view(self.layout.cells, -1)
        levels = cells[:, : self._levels].view(torch.int8).reshape(self._shape)
        scales = cells[:, self._levels :].contiguous().view(torch.float32).view(self._shape[:-1])
        self._values(block).copy_(dequantize(levels, scales, self._dtype))

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.layout.cells, 2, self.layout.tokens, self.layout.dim

    def _values(self, block: Block) -> Tensor:
        return torch.from_numpy(block).view(self._dtype).view(self._shape)
