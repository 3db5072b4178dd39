"""RMSNorm and the fused residual addition against fp64, on rows that fit no power of two and views of larger ones."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.norm_rope import add_rms_norm_inplace, rms_norm
from tests.kernels.interpreted.rounding import DTYPES, close

EPSILON = 1e-5


def some(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random, and every other column only of a larger tensor's rows: a stride that is not the width."""
    whole = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype)
    whole[..., : shape[-1]] = torch.randn(shape)
    return whole[..., : shape[-1]]


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """fp64, with the one rounding in the middle that Hugging Face makes."""
    return reference.rms_norm(x, torch.ones(x.shape[-1]), EPSILON).to(x.dtype).double() * weight.double()


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 111), (3, 576), (2, 4096)])
@pytest.mark.parametrize("gemma", [False, True])
def test_rms_norm(dtype: torch.dtype, tokens: int, width: int, gemma: bool) -> None:
    torch.manual_seed(width)
    x, weight = some(tokens, width, dtype=dtype), torch.randn(width).to(dtype)
    expected = reference.rms_norm(x, 1 + weight.double(), EPSILON) if gemma else llama(x, weight)
    # where the value in the middle lies between two numbers, either neighbour is right: one unit more
    assert close(rms_norm(x, weight, EPSILON, gemma=gemma), expected, units=1 if gemma else 2)


@DTYPES
def test_a_weight_per_head(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = some(4, 5, 80, dtype=dtype)[:, 1:4], torch.randn(3, 80).to(dtype)
    expected = torch.stack([llama(x[:, head], weight[head]) for head in range(3)], 1)
    assert close(rms_norm(x, weight, EPSILON), expected, units=2)


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 111), (3, 576), (2, 4096)])
def test_the_residual_is_stored_rounded_and_that_is_normalised(dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(width)
    hidden, x = some(tokens, width, dtype=dtype), some(tokens, width, dtype=dtype)
    weight = torch.randn(width).to(dtype)
    stream = (hidden.double() + x.double()).to(dtype)
    y = add_rms_norm_inplace(hidden, x, weight, EPSILON)
    assert torch.equal(hidden, stream)
    assert close(y, llama(stream, weight), units=2)


def test_large_values_do_not_lose_the_residual() -> None:
    hidden, x = torch.full((1, 576), 256.0, dtype=torch.bfloat16), torch.full((1, 576), 3.0, dtype=torch.bfloat16)
    add_rms_norm_inplace(hidden, x, torch.ones(576, dtype=torch.bfloat16), EPSILON)
    assert torch.equal(hidden, torch.full((1, 576), 260.0, dtype=torch.bfloat16))  # 259 is a tie; 260 is even


def test_a_row_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(7, 576).bfloat16(), torch.randn(576).bfloat16()
    together = rms_norm(x, weight, EPSILON)
    assert torch.equal(together[3:4], rms_norm(x[3:4], weight, EPSILON))


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 64), torch.ones(64), EPSILON).shape == (0, 64)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 heads"):
        rms_norm(torch.ones(2, 3, 8), torch.ones(5, 8), EPSILON)
    with pytest.raises(ValueError, match="16384"):
        rms_norm(torch.ones(1, 20_000), torch.ones(20_000), EPSILON)
