"""One engine step as tensors: the flat batch of all its tokens, what they write, and which rows are sampled.

    rows   0 .. D-1 │ D ........................ T-1      D chunks of one token (decode), longest first, so that runs
           decode   │ chunk 1 │ chunk 2 │ ...             of similar lengths can share an attention segment; then the
                                                          longer chunks (prefill)

Built with numpy from the chunks' block tables; nothing here depends on weights. Tensor letters as in kernels/reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention import Segment
from kvstore.layout import Layout
from workers.attention import Geometry, SegmentAttention
from workers.cache import KvCache
from workers.runner import Chunk
from workers.segments import Ints, Span, segments


@dataclass(frozen=True, slots=True)
class StepBatch:
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    write_rows: Tensor  # [T * 2 * Hkv]: where a token's keys, then values, of layer 0 go, in rows of D
    fresh_blocks: Tensor  # [N]: blocks that this step begins and does not fill
    segments: dict[int, tuple[Segment, ...]]  # sliding window -> what its layers attend to
    sample_rows: Tensor  # [R]: rows whose logits are wanted
    sampled: tuple[int, ...]  # [R]: index of the chunk each belongs to

    def attention(self, geometry: Geometry, rope_table: Tensor, cache: KvCache) -> SegmentAttention:
        cache.clear(self.fresh_blocks)
        return SegmentAttention(geometry, rope_table, cache, self.positions, self.write_rows, self.segments)


def build_batch(chunks: Sequence[Chunk], layout: Layout, windows: Iterable[int], device: torch.device) -> StepBatch:
    """`windows` are the sliding windows that occur in the model, 0 for none. At least one chunk."""
    decode = sorted((i for i, chunk in enumerate(chunks) if chunk.take == 1), key=lambda i: -chunks[i].first)
    order = decode + [i for i, chunk in enumerate(chunks) if chunk.take > 1]  # row order -> index of the chunk
    spans: list[Span] = []
    token_ids: list[int] = []
    for i in order:
        span = _span(chunks[i], len(token_ids), layout.tokens)
        token_ids += chunks[i].sequence.tokens[span.first : span.last]
        spans.append(span)
    positions = np.concatenate([np.arange(span.first, span.last) for span in spans])
    blocks = np.concatenate([span.blocks[np.arange(span.first, span.last) // layout.tokens] for span in spans])
    samples = [
        (span.row + span.last - span.first - 1, i) for span, i in zip(spans, order, strict=True) if chunks[i].samples
    ]

    def tensor(values: Ints | list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(device)

    return StepBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        write_rows=tensor(_write_rows(blocks, positions % layout.tokens, layout)),
        fresh_blocks=tensor([block for span in spans for block in _fresh(span, layout.tokens)]),
        segments={w: segments(spans[: len(decode)], spans[len(decode) :], w, layout, device) for w in windows},
        sample_rows=tensor([row for row, _ in samples]),
        sampled=tuple(i for _, i in samples),
    )


def _span(chunk: Chunk, row: int, block_size: int) -> Span:
    last = chunk.first + chunk.take
    blocks = chunk.sequence.block_table[: -(-last // block_size)]
    return Span(row, chunk.first, last, np.asarray(blocks, np.int64))


def _write_rows(blocks: Ints, slots: Ints, layout: Layout) -> Ints:  # [T], [T] -> [T * 2 * Hkv]
    """Rows of D in the cache seen as [(block, head, layer, K or V, slot), D]."""
    heads, kinds = np.arange(layout.heads), np.arange(2)[:, None]
    cells = (blocks[:, None, None] * layout.heads + heads) * (2 * layout.layers) + kinds  # [T, 2, Hkv]
    return (cells * layout.tokens + slots[:, None, None]).reshape(-1)


def _fresh(span: Span, block_size: int) -> list[int]:
    """The span's last block, if the span begins it and leaves slots behind. Those slots are read with weight zero,
    and zero times whatever memory held before may be NaN."""
    begins = (span.last - 1) // block_size * block_size
    return [int(span.blocks[-1])] if begins >= span.first and span.last % block_size else []
