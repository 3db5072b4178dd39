"""A rectangle of a block in two places, against the plain definition: the block as an array [head, layer, cell]."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.copying import checksums
from kvstore.layout import Layout, Rectangle
from kvstore.part import Part


@st.composite
def parts(draw: st.DrawFn) -> Part:
    layout = Layout(draw(st.integers(1, 5)), draw(st.integers(1, 5)), 2, 2, "float32", 4)
    head0, layer0 = draw(st.integers(0, layout.heads - 1)), draw(st.integers(0, layout.layers - 1))
    head1, layer1 = draw(st.integers(head0 + 1, layout.heads)), draw(st.integers(layer0 + 1, layout.layers))
    return Part(layout, Rectangle(head0, head1, layer0, layer1))


def cells(block: np.ndarray, layout: Layout) -> np.ndarray:
    return block.reshape(layout.heads, layout.layers, layout.cell_bytes)


@given(parts(), st.integers(1, 200))
def test_a_part_is_its_cells_in_order(part: Part, limit: int) -> None:
    layout, r = part.layout, part.rectangle
    block = np.random.default_rng(1).integers(0, 256, layout.block_bytes, np.uint8)
    wanted = cells(block, layout)[r.head0 : r.head1, r.layer0 : r.layer1].reshape(-1)
    own = np.zeros(part.own.block_bytes, np.uint8)
    part.read(own, block)
    assert (own == wanted).all()
    assert part.pick(checksums(block, layout)) == checksums(own, part.own)
    other = np.zeros_like(block)
    assert part.write(other, own) == checksums(own, part.own)
    assert (cells(other, layout)[r.head0 : r.head1, r.layer0 : r.layer1].reshape(-1) == own).all()
    assert np.count_nonzero(other) == np.count_nonzero(own), "nothing else is written"
    pieces = list(part.pieces(limit))
    assert all(length % layout.cell_bytes == 0 and length <= max(limit, layout.cell_bytes) for _, _, length in pieces)
    assert b"".join(block[offset : offset + length].tobytes() for offset, _, length in pieces) == own.tobytes()
    assert [at for _, at, _ in pieces] == [sum(p[2] for p in pieces[:i]) for i in range(len(pieces))]


def test_a_whole_block_is_one_run() -> None:
    layout = Layout(3, 4, 2, 2, "float32", 4)
    part = Part(layout)
    assert (part.runs, part.own, part.is_whole, part.wire) == ([(0, 0, layout.block_bytes)], layout, True, ())
    assert Part(layout, Rectangle(1, 3, 0, 4)).wire == (1, 3, 0, 4)
    assert len(Part(layout, Rectangle(1, 3, 0, 4)).runs) == 1, "whole heads lie side by side"
