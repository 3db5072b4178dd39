"""Whole blocks go where they should, byte for byte, and nothing else is touched."""

import pytest
import torch
from torch import Tensor

from kernels.block_copy import gather_blocks, scatter_blocks

IDS = torch.tensor([6, 0, 3, 5], dtype=torch.int32)
# block size 16 of a small head; more than one tile per block; a block of an odd number of bytes
SHAPES = [(7, 1, 2, 2, 16, 8), (7, 2, 3, 2, 16, 64), (7, 1, 1, 1, 5, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN codes and all."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def raw(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("programs", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_and_scattered(dtype: torch.dtype, shape: tuple[int, ...], programs: int) -> None:
    torch.manual_seed(0)
    cache = random_bytes(shape, dtype)
    out = random_bytes((len(IDS), cache[0].numel()), dtype)
    gather_blocks(cache, IDS, out, programs)
    for row, block in enumerate(IDS.tolist()):
        assert torch.equal(raw(out[row]), raw(cache[block]))
    other = random_bytes(shape, dtype)
    before = other.clone()
    scatter_blocks(other, IDS, out, programs)
    for block in range(shape[0]):
        assert torch.equal(raw(other[block]), raw((cache if block in IDS else before)[block]))


def test_no_blocks() -> None:
    gather_blocks(torch.ones(3, 4), torch.empty(0, dtype=torch.int32), torch.empty(0, 4))


@pytest.mark.parametrize(
    ("run", "message"),
    [(torch.empty(2, 8), "must be"), (torch.empty(4, 8).half(), "must be"), (torch.empty(4, 16)[:, ::2], "contiguous")],
)
def test_what_is_not_a_run_of_blocks_is_refused(run: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_blocks(torch.ones(7, 8), IDS, run)
