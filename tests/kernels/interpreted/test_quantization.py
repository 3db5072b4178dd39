"""The kernel's bytes are those of the CPU's statement of the format."""

import pytest
import torch
from torch import Tensor

from kernels.quantization import dequantize, quantize

FORMATS = pytest.mark.parametrize("levels", [torch.int8, torch.float8_e4m3fn], ids=str)


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.quantization.uses_triton", lambda x: False)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 80), (70, 128), (1, 1), (2, 256)], ids=str)
def test_the_same_bytes_and_back(
    levels: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(len(shape))
    values = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    values[0] = 0
    found, scales = quantize(values, levels)
    back = dequantize(found, scales, dtype)
    on_cpu(monkeypatch)
    expected, expected_scales = quantize(values, levels)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    assert torch.equal(back, dequantize(expected, expected_scales, dtype))


@FORMATS
def test_ties_go_to_even(levels: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 127.0 if levels is torch.int8 else 448.0
    halves = torch.arange(-120, 120) / 2 + 0.0
    values = torch.cat((torch.tensor([largest]), halves))[None]  # scale 1
    found, scales = quantize(values, levels)
    assert scales.tolist() == [1.0]
    on_cpu(monkeypatch)
    assert torch.equal(found.float(), quantize(values, levels)[0].float())


def test_views_and_nothing() -> None:
    whole: Tensor = torch.randn(4, 6, 32)
    part = whole[:, 1:3, ::2]
    assert torch.equal(quantize(part)[0], quantize(part.clone())[0])
    assert quantize(torch.empty(0, 8))[1].shape == (0,)
