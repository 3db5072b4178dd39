"""The conversions that stand in for the GPU's are bit for bit torch's, which are IEEE's."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import dot, rounded

E4M3_MAX = 448.0
BLOCK = 4096


@triton.jit
def _round_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, rounded(tl.load(x + at, inside, 0.0), out.dtype.element_ty), inside)


@triton.jit
def _dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    found = dot(
        tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]), tl.full((M, N), 1.0, tl.float32)
    )
    tl.store(out + m * N + n[None, :], found)


def rounded_by_kernel(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _round_kernel[(triton.cdiv(len(x), BLOCK),)](x, out, len(x), BLOCK=BLOCK)
    return out


def interesting(dtype: torch.dtype) -> Tensor:
    """Every finite value of the type, what lies halfway between neighbours, and what lies just beside both."""
    width = torch.int8 if dtype.itemsize == 1 else torch.int16
    codes = torch.arange(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1)).to(width)
    values = codes.view(dtype).float()
    values = values[values.isfinite()].unique()  # ascending
    between = ((values[1:].double() + values[:-1].double()) / 2).float()
    exact = torch.cat((values, between))
    beside = [exact.nextafter(torch.full_like(exact, way)) for way in (torch.inf, -torch.inf)]
    x = torch.cat((exact, *beside, torch.tensor([-0.0])))
    return x[x.abs() <= torch.finfo(dtype).max]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_rounding_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.cat((interesting(dtype), torch.randn(20_000, generator=torch.Generator().manual_seed(0))))
    bits = torch.int8 if dtype.itemsize == 1 else torch.int16
    assert torch.equal(rounded_by_kernel(x, dtype).view(bits), x.to(dtype).view(bits))


def test_bf16_of_what_is_beyond_every_number() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).max])
    assert torch.equal(rounded_by_kernel(x, torch.bfloat16), x.to(torch.bfloat16))


def test_e4m3_saturates() -> None:
    x = torch.tensor([448.0, 464.0, 464.1, 1e9, torch.inf])
    assert torch.equal(
        rounded_by_kernel(torch.cat((x, -x)), torch.float8_e4m3fn).float(), E4M3_MAX * torch.cat((x, -x)).sign()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_dot_multiplies_values_and_adds_to_the_accumulator(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    out = torch.full((16, 16), torch.nan)
    _dot_kernel[(1,)](a, b, out, M=16, N=16, K=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double() + 1, rtol=1e-5, atol=1e-5)
