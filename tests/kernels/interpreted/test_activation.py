"""SwiGLU's gate against fp64, to one unit in the last place."""

import pytest
import torch

from kernels import reference
from kernels.activation import silu_and_mul
from tests.kernels.interpreted.rounding import DTYPES, close


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 111), (5, 576), (2, 4096)])
def test_silu_and_mul(dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(width)
    whole = torch.full((tokens, 2 * width + 5), torch.nan, dtype=dtype)
    whole[:, : 2 * width] = 4 * torch.randn(tokens, 2 * width)
    gate_up = whole[:, : 2 * width]
    assert close(silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


def test_gates_beyond_the_exponential() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    assert torch.equal(silu_and_mul(gate_up), torch.tensor([[0.0, 600.0, 0.0]]))


def test_no_tokens() -> None:
    assert silu_and_mul(torch.empty(0, 64)).shape == (0, 32)
