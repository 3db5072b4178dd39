"""Paged attention over hand-made segments; `tests/workers/test_segments.py` covers the ragged cases."""

import pytest
import torch

from kernels import reference
from kernels.attention import Mask, Segment, Tile, block_rows, paged_attention, token_rows, write_kv_inplace

BLOCKS, HKV, LAYERS, SIZE, D, G = 6, 2, 3, 4, 8, 3


def cache_with(layer: int, table: list[int], k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A cache of NaN, except that the blocks of the table hold k and v [S, Hkv, D] in one layer."""
    cache = torch.full((BLOCKS, HKV, LAYERS, 2, SIZE, D), float("nan"), dtype=k.dtype)
    for position in range(len(k)):
        cache[table[position // SIZE], :, layer, 0, position % SIZE] = k[position]
        cache[table[position // SIZE], :, layer, 1, position % SIZE] = v[position]
    return cache


def rows_of(tables: list[list[int]]) -> torch.Tensor:
    rows = [
        (block * HKV + head) * LAYERS * 2 + kind
        for kind in (0, 1)
        for table in tables
        for head in range(HKV)
        for block in table
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_decode_tile(dtype: torch.dtype, layer: int) -> None:
    torch.manual_seed(layer)
    k, v = torch.randn(2, SIZE * 2, HKV, D).to(dtype)
    q = torch.randn(1, HKV * G, D).to(dtype)
    table = [4, 1]
    cache = cache_with(layer, table, k, v)
    segment = Segment(1, rows_of([table]), (Tile(0, 1, 0, 7, ()),))
    found = paged_attention(q, block_rows(cache)[layer], [segment], HKV, 0.3)
    expected = reference.attention(q[0], k[:7], v[:7], 0.3, 0).view(1, -1)
    assert (found - expected).norm() < (1e-5 if dtype is torch.float32 else 1e-2) * expected.norm()


def test_sequences_of_one_segment_do_not_mix() -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, SIZE * 3, HKV, D)
    cache = cache_with(1, [5, 0, 2], k, v)
    q = torch.randn(2, HKV * G, D)
    bias = torch.zeros(2, 1, 1, 1, 8)
    bias[1, ..., 3:] = float("-inf")
    segment = Segment(2, rows_of([[5, 0], [2, 2]]), (Tile(0, 2, 0, 8, (Mask(0, bias),)),))
    found = paged_attention(q, block_rows(cache)[1], [segment], HKV, 0.3)
    torch.testing.assert_close(
        found[0].double(), reference.attention(q[0], k[:8], v[:8], 0.3, 0).view(-1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found[1].double(), reference.attention(q[1], k[8:11], v[8:11], 0.3, 0).view(-1), rtol=1e-4, atol=1e-5
    )


def test_writing_lands_in_the_layer_and_nowhere_else() -> None:
    cache = torch.zeros(BLOCKS, HKV, LAYERS, 2, SIZE, D)
    kv = torch.randn(1, 2 * HKV, D)
    block, slot, layer = 3, 2, 1
    cells = [((block * HKV + head) * LAYERS * 2 + kind) * SIZE + slot for kind in (0, 1) for head in range(HKV)]
    write_kv_inplace(token_rows(cache)[layer], torch.tensor(cells), kv)
    assert torch.equal(cache[block, :, layer, 0, slot], kv[0, :HKV])
    assert torch.equal(cache[block, :, layer, 1, slot], kv[0, HKV:])
    assert int(cache.count_nonzero()) == kv.numel()
