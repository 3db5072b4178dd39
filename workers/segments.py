"""Which keys each row of a step attends to: attention segments, from the positions and blocks of its spans.

Decode spans of similar length share a segment, padded to the longest with blocks of their own and a mask; a prefill
span is a segment of its own, cut into tiles of queries. With a sliding window, only the blocks it can reach are
gathered. Tensor letters as in kernels/reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.attention import QUERY_TILE, Mask, Segment, Tile
from kvstore.layout import Layout

GROUP_COST_TOKENS = 384  # another decode segment costs as much as attending to this many tokens of padding
GATHER_BYTES = 8 * 2**20  # keys and values of one decode segment and layer; scratch memory, and more is no faster

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [first, last) of one sequence, computed by the rows from `row` on."""

    row: int
    first: int
    last: int
    blocks: Ints  # position // block_size -> block id, up to last - 1

    def visible(self, window: int) -> int:
        """The first position that any of its queries sees."""
        return max(0, self.first + 1 - window) if window else 0


def segments(
    decode: Sequence[Span], prefill: Sequence[Span], window: int, layout: Layout, device: torch.device
) -> tuple[Segment, ...]:
    """Segments that cover every row once. `decode` spans have one position, adjacent rows, and the longest first."""
    groups = (_decode_segment(group, window, layout, device) for group in _groups(decode, window, layout))
    return (*groups, *(_prefill_segment(span, window, layout, device) for span in prefill))


def _groups(spans: Sequence[Span], window: int, layout: Layout) -> Iterator[Sequence[Span]]:
    """Runs of spans that are cheaper to attend together than apart."""
    row_bytes = layout.token_bytes // layout.layers
    start, padding = 0, 0
    for index, span in enumerate(spans):
        longest = spans[start].last - spans[start].visible(window)
        padding += longest - (span.last - span.visible(window))
        gathered = (index + 1 - start) * longest * row_bytes
        if index > start and (padding > GROUP_COST_TOKENS or gathered > GATHER_BYTES):
            yield spans[start:index]
            start, padding = index, 0
    if spans:
        yield spans[start:]


def _decode_segment(spans: Sequence[Span], window: int, layout: Layout, device: torch.device) -> Segment:
    size = layout.tokens
    visible = np.array([span.visible(window) for span in spans])
    first_block = visible // size
    low = visible - first_block * size  # valid keys of a span are [low, high) of what is gathered for it
    high = np.array([span.last for span in spans]) - first_block * size
    width = int(-(-high.max() // size))
    last_block = -(-high // size) - 1
    columns = np.minimum(np.arange(width), last_block[:, None]) + first_block[:, None]  # [B, width]
    blocks = np.stack([span.blocks[column] for span, column in zip(spans, columns, strict=True)])

    # whole blocks even for one sequence: oneDNN compiles a kernel per shape, half a millisecond each
    keys = np.arange(width * size)
    hidden = (keys < low[:, None]) | (keys >= high[:, None])  # [B, S]
    masks = (Mask(0, _bias(torch.from_numpy(hidden)[:, None, None, None], layout, device)),) if hidden.any() else ()
    tile = Tile(spans[0].row, spans[0].row + len(spans), 0, len(keys), masks)
    return Segment(len(spans), _block_rows(blocks, layout, device), (tile,))


def _prefill_segment(span: Span, window: int, layout: Layout, device: torch.device) -> Segment:
    first_block = span.visible(window) // layout.tokens
    origin = first_block * layout.tokens  # the position of the first gathered key
    length = min(QUERY_TILE, span.last - span.first)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    causal = _bias(future[None, None, None], layout, device)  # [1, 1, 1, Q, Q]
    tiles = []
    for first in range(span.first, span.last, QUERY_TILE):
        last = min(first + QUERY_TILE, span.last)
        queries, start = last - first, max(0, first + 1 - window) if window else 0
        masks = [Mask(last - queries - start, causal[..., :queries, :queries])]
        # query r sees keys from first + r + 1 - window on; column c is key start + c
        outrun = first - window - start  # the last column that query 0 must not see
        if window and queries + outrun > 0:
            past = torch.ones(queries, queries + outrun, dtype=torch.bool).tril(outrun)
            masks.append(Mask(0, _bias(past[None, None, None], layout, device)))
        row = span.row + first - span.first
        tiles.append(Tile(row, row + queries, start - origin, last - origin, tuple(masks)))
    return Segment(1, _block_rows(span.blocks[None, first_block:], layout, device), tuple(tiles))


def _bias(hidden: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """-inf where `hidden`, else 0, in the dtype of the scores."""
    bias = torch.zeros(hidden.shape, dtype=getattr(torch, layout.dtype))
    return bias.masked_fill_(hidden, float("-inf")).to(device)


def _block_rows(blocks: Ints, layout: Layout, device: torch.device) -> Tensor:  # [B, blocks] -> [2 * B * Hkv * blocks]
    """Rows of layer 0's keys, then values, in the cache seen as [(block, head, layer, K or V), block_size * D]."""
    heads, kinds = np.arange(layout.heads)[:, None], np.arange(2)[:, None, None, None]
    rows = (blocks[:, None] * layout.heads + heads) * (2 * layout.layers) + kinds
    return torch.from_numpy(rows.reshape(-1)).to(device)
