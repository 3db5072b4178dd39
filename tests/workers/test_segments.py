"""Ragged batches against the reference: every row sees exactly the keys it may see, and no slot nobody wrote."""

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.attention import paged_attention
from kvstore.layout import Layout
from workers.cache import KvCache
from workers.segments import Span, segments

SIZE, HKV, G, D, LAYERS = 4, 2, 3, 8, 2
LAYOUT = Layout(HKV, LAYERS, SIZE, D, "float32", 4)
CPU = torch.device("cpu")
# (first, last) of the spans: around block edges, around tile edges, with and without a prefix
DECODE = [(0, 1), (2, 3), (3, 4), (4, 5), (7, 8), (8, 9), (30, 31), (31, 32), (2000, 2001)]
PREFILL = [(0, 2), (0, 3), (0, 4), (0, 5), (3, 9), (4, 8), (0, 63), (0, 64), (0, 65), (5, 200), (129, 260)]


def attend(
    decode: list[tuple[int, int]], prefill: list[tuple[int, int]], window: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the segments of these spans compute, and what the reference does, [T, Hq * D] each."""
    torch.manual_seed(seed)
    order = sorted(decode, key=lambda span: -span[1])
    counts = [-(-last // SIZE) for _, last in order + prefill]
    blocks = torch.randperm(sum(counts) + 3).numpy()
    cache = KvCache(LAYOUT, len(blocks), CPU)
    cache.blocks.fill_(float("nan"))
    spans, histories, row, taken = [], [], 0, 0
    for (first, last), count in zip(order + prefill, counts, strict=True):
        table = blocks[taken : taken + count]
        taken += count
        spans.append(Span(row, first, last, table.astype(np.int64)))
        row += last - first
        cache.blocks[table[-1]] = 0  # as a step does with a block that it begins and does not fill
        k, v = torch.randn(2, last, HKV, D)
        positions = torch.arange(last)
        where = torch.from_numpy(table)[positions // SIZE], positions % SIZE
        cache.blocks[where[0], :, 1, 0, where[1]] = k
        cache.blocks[where[0], :, 1, 1, where[1]] = v
        histories.append((k, v))
    q = torch.randn(row, HKV * G, D)
    made = segments(spans[: len(decode)], spans[len(decode) :], window, LAYOUT, CPU)
    found = paged_attention(q, cache.block_rows[1], made, HKV, 0.4)
    expected = [
        reference.attention(q[span.row + i], k[: span.first + i + 1], v[: span.first + i + 1], 0.4, window).view(-1)
        for span, (k, v) in zip(spans, histories, strict=True)
        for i in range(span.last - span.first)
    ]
    return found.double(), torch.stack(expected)


@pytest.mark.parametrize("window", [0, 1, 5, 16, 64, 70, 5000])
def test_a_mixed_step_equals_the_reference(window: int) -> None:
    found, expected = attend(DECODE, PREFILL, window)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("span", DECODE + PREFILL, ids=str)
def test_a_span_alone_equals_the_reference(span: tuple[int, int], window: int) -> None:
    alone = ([span], []) if span[1] - span[0] == 1 else ([], [span])
    found, expected = attend(*alone, window)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_similar_lengths_share_a_segment_and_very_different_ones_do_not() -> None:
    def decode(lengths: list[int]) -> list[int]:
        table = np.arange(-(-max(lengths) // SIZE))
        spans = [Span(row, length - 1, length, table) for row, length in enumerate(lengths)]
        return [segment.sequences for segment in segments(spans, [], 0, LAYOUT, CPU)]

    assert decode([210, 209, 200, 190]) == [4]
    assert decode([8000, 7990, 120, 100, 3]) == [2, 3]


def test_a_window_gathers_only_the_blocks_it_reaches() -> None:
    span = Span(0, 4000, 4001, np.arange(1001))
    (segment,) = segments([span], [], 8, LAYOUT, CPU)
    assert segment.block_rows.numel() == 2 * HKV * 3  # positions 3993 .. 4000 lie in three blocks
