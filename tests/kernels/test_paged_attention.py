"""The work lists, what the entry refuses, and the plain form against the oracle; `interpreted/` has the kernels."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.paged_attention import CHUNK, attend, decode_items, prefill_tiles, tile_queries
from tests.kernels.paged import LAYER, case

FP8 = torch.float8_e4m3fn


@given(st.lists(st.integers(0, 4 * CHUNK), max_size=20))
def test_decode_items_cover_every_key_once_and_in_order(lengths: list[int]) -> None:
    items, starts = decode_items(np.array(lengths, np.int32))
    assert items.dtype == starts.dtype == np.int32
    assert len(starts) == len(lengths) + 1
    assert len(items) == starts[-1]
    for row, length in enumerate(lengths):
        chunks = [(row, chunk) for chunk in range(-(-length // CHUNK))]
        assert [tuple(item) for item in items[starts[row] : starts[row + 1]].tolist()] == chunks


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=8), st.integers(0, 3), st.integers(1, 16))
def test_prefill_tiles_cover_every_query_once_longest_first(
    chunks: list[tuple[int, int]], decodes: int, group: int
) -> None:
    queries = [1] * decodes + [count for _, count in chunks]
    lengths = [7] * decodes + [context + count for context, count in chunks]
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    size = tile_queries(group)
    tiles = prefill_tiles(np.array(lengths, np.int32), starts, decodes, group)
    assert tiles.dtype == np.int32
    assert sorted(map(tuple, tiles.tolist())) == [
        (sequence, first) for sequence in range(decodes, len(queries)) for first in range(0, queries[sequence], size)
    ]
    keys = [lengths[s] - queries[s] + min(first + size, queries[s]) for s, first in tiles.tolist()]
    assert keys == sorted(keys, reverse=True)


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_the_plain_form(dtype: torch.dtype, tolerance: float, window: int) -> None:
    case([0, 1, 30, 17, 40], [1, 1, 1, 17, 5], 3, dtype=dtype).check(tolerance, window)


@pytest.mark.parametrize("kv_dtype", [torch.int8, FP8])
def test_the_plain_form_in_eight_bits(kv_dtype: torch.dtype) -> None:
    case([30, 17], [1, 17], 1, kv_dtype=kv_dtype).check(1e-5)


@pytest.mark.parametrize("kv_dtype", [torch.int8, FP8])
def test_cells_of_a_block_may_have_something_behind_them(kv_dtype: torch.dtype) -> None:
    """As where scales lie among the levels."""
    made = case([30, 17], [1, 17], 1, kv_heads=2, kv_dtype=kv_dtype)

    def apart(x: torch.Tensor) -> torch.Tensor:
        cells = x.flatten(3)
        return torch.cat((cells, cells[..., :16]), -1)[..., : cells.shape[-1]].unflatten(-1, x.shape[3:])

    assert made.scales is not None
    levels = apart(made.cache.view(torch.uint8)).view(kv_dtype)
    assert not levels.is_contiguous()
    dataclasses.replace(made, cache=levels, scales=apart(made.scales)).check(1e-5)


def test_what_no_kernel_serves_is_refused() -> None:
    good = case([20], [1], 1, kv_heads=2)
    eight_bits = case([20], [1], 1, kv_heads=2, kv_dtype=torch.int8)

    def refused(match: str, q: torch.Tensor, cache: torch.Tensor, scale: float = 1.0) -> None:
        with pytest.raises(ValueError, match=match):
            attend(q, cache, LAYER, good.step, scale, 0)

    refused("1 to 16", good.q[:, :5], good.cache)
    refused("1 to 16", good.q[..., :32], good.cache)
    refused("multiple of 16", good.q, good.cache[..., :8, :].contiguous())
    refused("contiguous", good.q, good.cache.transpose(0, 1).contiguous().transpose(0, 1))
    refused("contiguous", good.q, good.cache.transpose(3, 4).contiguous().transpose(3, 4))
    refused("must be the same", good.q.half(), good.cache)
    refused("needs scales", good.q, eight_bits.cache)
    refused("positive", good.q, good.cache, 0.0)
