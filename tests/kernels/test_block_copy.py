"""On the CPU; tests/kernels/interpreted/test_block_copy.py has the same for the GPU's kernel."""

import pytest
import torch

from kernels.block_copy import gather_blocks, scatter_blocks

IDS = torch.tensor([4, 0, 2], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 3, 2, 16, 8), (5, 1, 1, 1, 3, 3)], ids=str)
def test_gathered_and_scattered_byte_for_byte(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cache = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    blocks = cache.view(5, -1)
    out = torch.empty(3, torch.Size(shape[1:]).numel(), dtype=dtype)
    gather_blocks(cache.view(dtype).view(shape), IDS, out)
    assert torch.equal(out.view(torch.uint8), blocks[IDS.long()])
    other = torch.zeros(shape, dtype=dtype)
    scatter_blocks(other, IDS, out)
    expected = torch.zeros_like(blocks)
    expected[IDS.long()] = blocks[IDS.long()]
    assert torch.equal(other.view(5, -1).view(torch.uint8), expected)


def test_a_run_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        gather_blocks(torch.ones(5, 8), IDS, torch.empty(2, 8))
