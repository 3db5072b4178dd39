"""Every fast operation against its plain fp64 statement."""

import math

import pytest
import torch

from kernels import reference
from kernels.activation import silu_and_mul
from kernels.linear import Linear, packs
from kernels.norm_rope import rms_norm, rope_inplace

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Relative distance in the 2-norm; NaN is not close to anything."""
    return bool((found.double() - expected).norm() <= TOLERANCE[found.dtype] * expected.norm())


@DTYPES
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 36, 52), (3, 8, 1), (65, 100, 7), (8, 576, 960)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    assert close(Linear(weight, bias)(x), reference.linear(x, weight, bias))


def test_linear_takes_a_weight_that_is_a_view() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 12), torch.randn(12, 9).T
    assert close(Linear(weight)(x), reference.linear(x, weight, None))


def test_linear_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.linear.packs", lambda dtype: False)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 12), torch.randn(9, 12), torch.randn(9)
    assert close(Linear(weight, bias)(x), reference.linear(x, weight, bias))


def test_only_dtypes_the_engine_computes_in_are_packed() -> None:
    assert not packs(torch.float64)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 36), (9, 576), (4, 3, 16)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert close(rms_norm(x, weight, 1e-3), reference.rms_norm(x, weight, 1e-3))


def test_rms_norm_with_a_weight_per_head() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 16), torch.randn(3, 16)
    assert close(
        rms_norm(x, weight, 1e-5), torch.stack([reference.rms_norm(x[:, h], weight[h], 1e-5) for h in range(3)], 1)
    )


@DTYPES
@pytest.mark.parametrize("tokens", [1, 7])
def test_rope(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(tokens, 5, 16).to(dtype)
    angles = torch.rand(tokens, 8) * math.tau
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    expected = reference.rope(whole[:, :3], angles)
    untouched = whole[:, 3:].clone()
    rope_inplace(whole[:, :3], cos.to(dtype), sin.to(dtype))  # a view, as the decoder rotates q and k inside qkv
    assert close(whole[:, :3], expected)
    assert torch.equal(whole[:, 3:], untouched)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 33])
def test_silu_and_mul(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(tokens, 104)).to(dtype)
    assert close(silu_and_mul(gate_up), reference.silu_and_mul(gate_up))
