"""KV in 8 bits: symmetric, one scale per head and token of K and of V (cf. KIVI, arXiv:2402.02750, which finds that V
wants a scale per token; K would be a little more accurate per channel). Lossy: int8 by up to half a step per value,
e4m3 by up to a sixteenth of the value. Only for whoever accepts approximate KV.

The specification; the Triton kernel gives the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import uses_triton

LEVELS = 127  # -128 is not used: symmetric
E4M3_MAX = 448.0


def quantize(values: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """[..., D] -> int8 or float8_e4m3fn [..., D], float32 [...]. Nearest level of the row's largest magnitude / 127
    (448 for e4m3); a row of zeros has scale 0."""
    if uses_triton(values):
        from kernels import triton_quantization

        return triton_quantization.quantize(values, dtype)
    values = values.float()
    largest = LEVELS if dtype is torch.int8 else E4M3_MAX
    scales = values.abs().amax(dim=-1) / largest
    levels = values / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    if dtype is torch.int8:
        levels = levels.round()
    return levels.clamp(-largest, largest).to(dtype), scales


def dequantize(levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 or float8_e4m3fn [..., D], float32 [...] -> [..., D]"""
    if uses_triton(levels):
        from kernels import triton_quantization

        return triton_quantization.dequantize(levels, scales, dtype)
    return (levels.float() * scales.unsqueeze(-1)).to(dtype)
