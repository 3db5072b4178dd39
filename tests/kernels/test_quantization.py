import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.quantization import LEVELS, dequantize, quantize


@given(st.integers(0, 2**31), st.integers(1, 70), st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_value_comes_back_within_half_a_step(seed: int, dim: int, exponent: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(3, 5, dim, generator=generator) * 2.0**exponent).to(dtype)
    levels, scales = quantize(values)
    assert levels.dtype is torch.int8
    assert scales.shape == (3, 5)
    error = (dequantize(levels, scales, torch.float32) - values.float()).abs()
    assert (error <= scales.unsqueeze(-1) * 0.5001).all()
    assert (levels.abs().amax(dim=-1) == LEVELS).all()  # the whole range is used


def test_zeros_stay_zeros() -> None:
    levels, scales = quantize(torch.zeros(2, 4))
    assert not levels.any()
    assert not dequantize(levels, scales, torch.float32).any()


def test_each_row_has_its_own_scale() -> None:
    values = torch.tensor([[1e-3, 2e-3], [1e3, -2e3]])
    back = dequantize(*quantize(values), torch.float32)
    assert torch.allclose(back, values, rtol=0.01)


def test_e4m3_keeps_a_sixteenth_of_each_value_and_uses_the_whole_range() -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    levels, scales = quantize(values, torch.float8_e4m3fn)
    error = (dequantize(levels, scales, torch.float32) - values).abs()
    assert (error <= values.abs() / 15.9 + scales[:, None] * 2**-10).all()
    assert (levels.float().abs().amax(-1) == 448).all()
    assert not quantize(torch.zeros(2, 4), torch.float8_e4m3fn)[1].any()
