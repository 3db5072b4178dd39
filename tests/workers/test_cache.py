"""Where a KV cache has its values and scales: in every block's bytes, as stores have them."""

import dataclasses

import pytest
import torch

from kvstore.layout import Layout
from workers.cache import KvCache
from workers.quantization import Int8Codec

EXACT = Layout(heads=2, layers=3, tokens=16, dim=32, dtype="bfloat16", itemsize=2)
LAYOUTS = [EXACT, *(dataclasses.replace(EXACT, dtype=dtype, itemsize=1) for dtype in ("int8", "float8_e4m3fn"))]
CPU = torch.device("cpu")


def filled(layout: Layout) -> KvCache:
    """Of four blocks: every byte is another one than its neighbours."""
    cache = KvCache(layout, 4, CPU)
    size = cache.blocks.numel() * cache.blocks.itemsize
    cache.blocks.view(-1).view(torch.uint8).copy_(torch.arange(size) * 7 % 251)
    return cache


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
def test_a_cells_bytes_are_its_values_and_behind_them_its_scales(layout: Layout) -> None:
    cache = filled(layout)
    for block in range(4):
        found = torch.from_numpy(cache.bytes_of(block)).view(layout.heads, layout.layers, layout.cell_bytes)
        for head in range(layout.heads):
            for layer in range(layout.layers):
                held = cache.values[block, head, layer].reshape(-1).view(torch.uint8)
                if cache.scales is not None:
                    scales = cache.scales[block, head, layer].reshape(-1).view(torch.uint8)
                    held = torch.cat((held, scales))
                assert torch.equal(found[head, layer], held)
    assert (cache.scales is not None) == (layout is not EXACT)


def test_an_int8_block_is_what_the_codec_of_stores_makes_of_the_same_values() -> None:
    """One layout, whoever encodes."""
    codec, cache = Int8Codec(EXACT), KvCache(LAYOUTS[1], 1, CPU)
    values = torch.randn(EXACT.cells, 2, EXACT.tokens, EXACT.dim).bfloat16()
    cache.bytes_of(0)[:] = codec.encode(values.view(-1).view(torch.uint8).numpy())
    assert cache.scales is not None
    back = cache.values[0].float() * cache.scales[0].unsqueeze(-1)
    assert (back.view(values.shape) - values.float()).abs().max() < 0.03


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
def test_clearing_takes_scales_too_and_no_other_block(layout: Layout) -> None:
    cache, before = filled(layout), filled(layout)
    cache.clear(torch.tensor([2, 0]))
    for block in range(4):
        assert cache.bytes_of(block).any() == (block in (1, 3))
        assert block in (0, 2) or (cache.bytes_of(block) == before.bytes_of(block)).all()


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.dtype)
@pytest.mark.parametrize(("tokens", "dim"), [(16, 16), (16, 80), (48, 128), (128, 256)])
def test_kernels_can_read_16_bytes_at_a_time(layout: Layout, tokens: int, dim: int) -> None:
    """Whatever they are compiled for: a variant for unaligned addresses would be slower."""
    cache = KvCache(dataclasses.replace(layout, tokens=tokens, dim=dim), 2, CPU)
    assert cache.scales is not None
    for view in (cache.values, cache.scales):
        assert view.storage_offset() * view.itemsize % 16 == 0
        assert all(stride * view.itemsize % 16 == 0 for stride in view.stride()[:4])
