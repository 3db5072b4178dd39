"""Chunked-prefill paged attention against the oracle in fp64, against decode, and what must not change a bit of it."""

import random
from dataclasses import replace

import pytest
import torch

from tests.kernels.paged import case

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 5e-3}
# a prompt's only chunk, its first, a later one, tokens to verify, one query, and more queries than a tile has
LENGTHS = [1, 15, 17, 16 + 33, 128 + 5, 70, 150]
QUERIES = [1, 15, 17, 16, 5, 1, 100]


@pytest.mark.parametrize(
    ("dtype", "dim", "group", "kv_heads"),
    [(FP32, 64, 3, 2), (FP32, 80, 1, 1), (FP16, 128, 4, 1), (BF16, 128, 8, 1), (BF16, 96, 16, 1), (BF16, 256, 2, 1)],
)
def test_ragged_chunks(dtype: torch.dtype, dim: int, group: int, kv_heads: int) -> None:
    case(LENGTHS, QUERIES, dtype=dtype, dim=dim, group=group, kv_heads=kv_heads).check(TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 16, 33, 100, 1000])
def test_a_window(window: int) -> None:
    case([17, 40, 260, 300], [17, 5, 70, 1], group=2, kv_heads=1).check(1e-5, window)


@pytest.mark.parametrize("block_size", [32, 48, 128])
def test_block_sizes(block_size: int) -> None:
    lengths = [block_size - 1, block_size, block_size + 1, 2 * block_size + 5]
    case(lengths, [10] * 4, block_size=block_size).check(1e-5)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("kv_dtype", "dtype"), [(torch.int8, BF16), (FP8, BF16), (FP8, FP32)])
def test_eight_bits(kv_dtype: torch.dtype, dtype: torch.dtype, magnitude: float) -> None:
    chunks = case([20, 150], [20, 30], dtype=dtype, kv_dtype=kv_dtype, magnitude=magnitude)
    chunks.check(TOLERANCE[dtype])


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_no_bit_depends_on_batch_mates_or_on_where_blocks_are(kv_dtype: torch.dtype | None) -> None:
    lengths, queries = [40, 200, 90], [40, 13, 1]
    together, _ = case(lengths, queries, dtype=BF16, kv_dtype=kv_dtype).run()
    elsewhere, _ = case(lengths[::-1], queries[::-1], dtype=BF16, kv_dtype=kv_dtype, shuffle=1).run()
    assert torch.equal(together[:40], elsewhere[14:])
    assert torch.equal(together[40:53], elsewhere[1:14])
    assert torch.equal(together[53], elsewhere[0])


@pytest.mark.parametrize("window", [0, 50])
def test_the_last_row_is_what_decode_gives(window: int) -> None:
    lengths = [70, 33, 130]
    chunks, chunks_lse = case(lengths, [20, 33, 3]).run(window)
    rows, rows_lse = case(lengths, [1] * 3, 3).run(window)
    last = [19, 52, 55]
    torch.testing.assert_close(chunks[last], rows, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(chunks_lse[last], rows_lse, atol=1e-5, rtol=0)


def test_how_a_prompt_was_cut_into_chunks_makes_no_difference() -> None:
    whole, _ = case([150], [150]).run()
    chunk, _ = case([150], [37]).run()
    torch.testing.assert_close(whole[-37:], chunk, atol=1e-6, rtol=1e-5)


def test_one_step_with_both_kinds_and_padding() -> None:
    """Decoding rows, of which one is padding, then chunks; and a work list that is longer than the work."""
    mixed = case([30, 600, 0, 90, 20], [1, 1, 1, 40, 20], 3)
    spare = torch.full((3, 2), -1, dtype=torch.int32)
    step = replace(mixed.step, prefill_tiles=torch.cat((mixed.step.prefill_tiles, spare)))
    replace(mixed, step=step).check(1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed: int) -> None:
    """Decoding rows and chunks of any size, in any of the shapes that are served."""
    draw = random.Random(seed)
    decodes, chunks = draw.randint(0, 3), draw.randint(0, 3)
    queries = [1] * decodes + [draw.randint(1, 60) for _ in range(chunks)]
    lengths = [draw.randint(0, 700) for _ in range(decodes)] + [draw.randint(0, 90) + n for n in queries[decodes:]]
    dtype = draw.choice([FP32, FP16, BF16])
    step = case(
        [*lengths, 5],
        [*queries, 2],
        decodes,
        group=draw.randint(1, 16),
        kv_heads=draw.randint(1, 2),
        dim=draw.choice([16, 64, 80, 96, 128]),
        dtype=dtype,
        block_size=draw.choice([16, 32, 64, 112]),
        seed=seed,
    )
    step.check(TOLERANCE[dtype], draw.choice([0, draw.randint(1, 300)]))
