import dataclasses

import numpy as np
import pytest
import torch

from kvstore.copying import Block
from kvstore.layout import Layout
from workers.quantization import Int8Codec


@pytest.fixture(params=["float32", "bfloat16"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(heads=3, layers=2, tokens=16, dim=8, dtype=request.param, itemsize=4 if "32" in request.param else 2)


def block_of(layout: Layout, seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.block_bytes // layout.itemsize, generator=generator)
    return values.to(getattr(torch, layout.dtype)).view(torch.uint8).numpy()


def values_of(block: Block, layout: Layout) -> torch.Tensor:
    return torch.from_numpy(block).view(getattr(torch, layout.dtype)).float()


def test_a_block_comes_back_close(layout: Layout) -> None:
    codec, block, back = Int8Codec(layout), block_of(layout, 1), np.zeros(layout.block_bytes, np.uint8)
    stored = codec.encode(block)
    assert stored.shape == (codec.stored.block_bytes,)
    assert codec.stored.block_bytes == layout.cells * 2 * layout.tokens * (layout.dim + 4)
    codec.decode(stored, back)
    want, got = values_of(block, layout), values_of(back, layout)
    assert (want - got).abs().max() < 0.03
    assert not torch.equal(want, got)  # lossy: this is why exact requests never see it


def test_a_cell_depends_on_its_own_values_only(layout: Layout) -> None:
    """Or a shard could not read its rectangle of a block that another sharding wrote."""
    codec, block = Int8Codec(layout), block_of(layout, 2)
    before = codec.encode(block).reshape(layout.cells, -1)
    block.reshape(layout.cells, -1)[4] = block_of(layout, 3).reshape(layout.cells, -1)[4]
    after = codec.encode(block).reshape(layout.cells, -1)
    assert [i for i in range(layout.cells) if (before[i] != after[i]).any()] == [4]


def test_exact_and_quantized_parties_refuse_each_other(layout: Layout) -> None:
    stored = Int8Codec(layout).stored
    assert stored.fingerprint != layout.fingerprint
    assert stored.fingerprint != dataclasses.replace(stored, itemsize=2).fingerprint
