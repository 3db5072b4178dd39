"""KV in int8: symmetric, one scale per head and token of K and of V (cf. KIVI, arXiv:2402.02750, which finds that V
wants a scale per token; K would be a little more accurate per channel). Lossy by up to half a step per value: only for
whoever accepts approximate KV.

The specification; a Triton version must give the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127  # -128 is not used: symmetric


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> int8 [..., D], float32 [...]
    """Nearest level of the row's largest magnitude / 127; a row of zeros has scale 0."""
    values = values.float()
    scales = values.abs().amax(dim=-1) / LEVELS
    steps = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    return (values / steps).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


def dequantize(
    levels: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:  # int8 [..., D], float32 [...] -> [..., D]
    return (levels.float() * scales.unsqueeze(-1)).to(dtype)
