"""Any split of a block over writers and readers must move every byte to its place, whatever the two splits are."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.layout import Layout, Rectangle, runs, tiles, whole

layouts = st.builds(
    Layout,
    heads=st.integers(1, 8),
    layers=st.integers(1, 7),
    tokens=st.integers(1, 4),
    dim=st.integers(1, 4),
    dtype=st.just("bfloat16"),
    itemsize=st.just(2),
)


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Contiguous parts of range(size), even or not."""
    inner = sorted(draw(st.sets(st.integers(1, size - 1), max_size=4))) if size > 1 else []
    return list(itertools.pairwise([0, *inner, size]))


@st.composite
def splits(draw: st.DrawFn, layout: Layout) -> list[Rectangle]:
    """tp x pp shards: one cut of the heads, one of the layers."""
    return [Rectangle(*heads, *layers) for heads in draw(cuts(layout.heads)) for layers in draw(cuts(layout.layers))]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_in_8_bits_every_cell_has_its_scales(dtype: str) -> None:
    layout = Layout(heads=3, layers=2, tokens=16, dim=8, dtype=dtype, itemsize=1)
    assert layout.cell_bytes == 2 * 16 * (8 + 4)
    assert layout.block_bytes == 16 * layout.token_bytes == 6 * layout.cell_bytes


@given(st.data())
def test_any_writer_split_meets_any_reader_split(data: st.DataObject) -> None:
    layout = data.draw(layouts)
    writers, readers = data.draw(splits(layout)), data.draw(splits(layout))
    block = np.random.default_rng(0).integers(0, 256, layout.block_bytes, np.uint8)
    stored, fetched = np.zeros_like(block), np.zeros_like(block)
    for rectangle in writers:
        for offset, length in runs(layout, rectangle):
            assert not stored[offset : offset + length].any() or layout.block_bytes < 64  # nobody writes twice
            stored[offset : offset + length] = block[offset : offset + length]
    assert (stored == block).all()
    for rectangle in readers:
        assert tiles(layout, writers, rectangle)
        for offset, length in runs(layout, rectangle):
            fetched[offset : offset + length] = stored[offset : offset + length]
    assert (fetched == block).all()


@given(st.data())
def test_runs_are_the_rectangles_cells_in_order(data: st.DataObject) -> None:
    """Against the plain definition: the block as an array [head, layer, 2, token, dim]."""
    layout = data.draw(layouts)
    rectangle = data.draw(splits(layout).flatmap(st.sampled_from))
    block = np.arange(layout.block_bytes, dtype=np.uint32)
    shape = (layout.heads, layout.layers, 2, layout.tokens, layout.dim * layout.itemsize)
    r = rectangle
    expected = block.reshape(shape)[r.head0 : r.head1, r.layer0 : r.layer1].ravel()
    found = [block[offset : offset + length] for offset, length in runs(layout, rectangle)]
    assert (np.concatenate(found) == expected).all()
    for (offset, length), (following, _) in itertools.pairwise(runs(layout, rectangle)):
        assert offset + length < following, "touching runs are one run"


@given(st.data())
def test_a_missing_or_doubled_shard_is_noticed(data: st.DataObject) -> None:
    layout = data.draw(layouts)
    writers = data.draw(splits(layout))
    victim = data.draw(st.sampled_from(writers))
    assert tiles(layout, writers, whole(layout))
    assert not tiles(layout, [w for w in writers if w != victim], whole(layout))
    assert not tiles(layout, [*writers, victim], whole(layout))


@pytest.mark.parametrize(("heads", "ranks"), [(2, 8), (1, 4), (4, 4)])
def test_replicated_heads_need_an_elected_writer(heads: int, ranks: int) -> None:
    """GQA with more ranks than KV heads: ranks that share a head own the same rectangle, one of them writes it."""
    layout = Layout(heads, 3, 2, 2, "float32", 4)
    copies = ranks // heads
    owned = [Rectangle(rank // copies, rank // copies + 1, 0, 3) for rank in range(ranks)]
    elected = [owned[rank] for rank in range(ranks) if rank % copies == 0]
    assert tiles(layout, elected, whole(layout))
    assert tiles(layout, owned, whole(layout)) == (copies == 1)
    assert all(tiles(layout, elected, rectangle) for rectangle in owned)


def test_sizes() -> None:
    layout = Layout(heads=3, layers=30, tokens=16, dim=64, dtype="float32", itemsize=4)
    assert layout.cell_bytes == 2 * 16 * 64 * 4
    assert layout.block_bytes == 90 * layout.cell_bytes
    assert layout.token_bytes * 16 == layout.block_bytes
    assert runs(layout, whole(layout)) == [(0, layout.block_bytes)]


def test_every_field_is_in_the_fingerprint() -> None:
    layout = Layout(heads=3, layers=5, tokens=7, dim=9, dtype="float32", itemsize=4)
    sizes = ("heads", "layers", "tokens", "dim", "itemsize")
    others = [dataclasses.replace(layout, **{size: 2}) for size in sizes]  # type: ignore[arg-type]
    swapped = dataclasses.replace(layout, heads=5, layers=3)  # as many bytes, in other places
    prints = {x.fingerprint for x in [layout, swapped, *others, dataclasses.replace(layout, dtype="int32")]}
    assert len(prints) == 8
    assert all(len(p) == 8 for p in prints)
