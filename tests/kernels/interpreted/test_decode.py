"""Split paged decode against the oracle in fp64, and what must not change a bit of it."""

from dataclasses import replace

import pytest
import torch

from kernels.paged_attention import CHUNK
from tests.kernels.paged import Case, case

RAGGED = [0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1]
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 5e-3}


def decodes(lengths: list[int], **kwargs: object) -> Case:
    return case(lengths, [1] * len(lengths), len(lengths), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "dim", "group", "kv_heads"),
    [(FP32, 64, 3, 2), (FP32, 80, 1, 1), (FP16, 128, 4, 1), (BF16, 128, 8, 1), (BF16, 96, 16, 1), (BF16, 256, 2, 1)],
)
def test_ragged_lengths(dtype: torch.dtype, dim: int, group: int, kv_heads: int) -> None:
    decodes(RAGGED, dtype=dtype, dim=dim, group=group, kv_heads=kv_heads).check(TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 20, CHUNK + 30])
def test_a_window(window: int) -> None:
    decodes([1, 19, 20, 21, 70, CHUNK + 10, 2 * CHUNK + 7]).check(1e-5, window)


@pytest.mark.parametrize("block_size", [32, 48, 128])
def test_block_sizes(block_size: int) -> None:
    decodes([1, block_size - 1, block_size, block_size + 1, CHUNK + 1], block_size=block_size).check(1e-5)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("kv_dtype", "dtype"), [(torch.int8, BF16), (FP8, BF16), (FP8, FP32)])
def test_eight_bits(kv_dtype: torch.dtype, dtype: torch.dtype, magnitude: float) -> None:
    decodes([0, 1, 17, 70, CHUNK + 1], dtype=dtype, kv_dtype=kv_dtype, magnitude=magnitude).check(TOLERANCE[dtype])


def test_more_parts_than_are_merged_at_once() -> None:
    decodes([16 * CHUNK + 5, 3], group=1, kv_heads=1).check(1e-5)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_no_bit_depends_on_batch_mates_or_on_where_blocks_are(kv_dtype: torch.dtype | None) -> None:
    lengths = [40, CHUNK + 9, 200]
    together, _ = decodes(lengths, dtype=BF16, kv_dtype=kv_dtype).run()
    elsewhere, _ = decodes(lengths[::-1], dtype=BF16, kv_dtype=kv_dtype, shuffle=1).run()
    alone = [decodes([length], dtype=BF16, kv_dtype=kv_dtype, shuffle=2).run()[0][0] for length in lengths]
    assert torch.equal(together, elsewhere.flip(0))
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("window", [0, 600])
def test_splitting_changes_nothing_but_rounding(window: int) -> None:
    lengths = [2 * CHUNK - 1, CHUNK + 1, 5]
    split, split_lse = decodes(lengths).run(window)
    whole, whole_lse = case(lengths, [1] * 3).run(window)
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(split_lse, whole_lse, atol=1e-5, rtol=0)


def test_padding_of_a_graphs_bucket() -> None:
    """Two rows and their items, and then room for more of both."""
    exact = decodes([CHUNK + 5, 30])
    padded = decodes([CHUNK + 5, 30, 0, 0])
    spare = torch.full((5, 2), -1, dtype=torch.int32)
    step = replace(padded.step, decode_items=torch.cat((padded.step.decode_items, spare)))
    found, lse = replace(padded, step=step).run()
    assert torch.equal(found[:2], exact.run()[0])
    assert (found[2:] == 0).all()
    assert (lse[2:] == -torch.inf).all()


def test_nothing_but_padding() -> None:
    found, _ = decodes([0, 0]).run()
    assert (found == 0).all()
