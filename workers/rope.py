"""Tables of rotary angles: for every position, the cosines and signed sines that rotate a query or key head.

A position's angles depend on that position alone, never on how long its sequence is or how its prompt was cut into
chunks, because KV blocks are shared between sequences. That decides `dynamic` scaling: position p is rotated as the
last token of p + 1 tokens, which is what transformers computes when it decodes beyond the trained context.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.architecture import Rope


def rope_table(rope: Rope, head_dim: int, max_context: int, dtype: torch.dtype) -> Tensor:
    """[max_context, 2, head_dim]: cosines, and sines negated in the first half (see `kernels.norm_rope`)."""
    positions = torch.arange(max_context, dtype=torch.float32)
    angles = positions[:, None] * _frequencies(rope, head_dim, positions)  # [max_context, head_dim / 2]
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(dtype)


def _frequencies(rope: Rope, head_dim: int, positions: Tensor) -> Tensor:
    """Radians per token, [head_dim / 2], or [positions, head_dim / 2] where they depend on the position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "dynamic":
            return _dynamic(rope, head_dim, positions, exponents)
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, head_dim, frequencies)


def _dynamic(rope: Rope, head_dim: int, positions: Tensor, exponents: Tensor) -> Tensor:
    """NTK-aware scaling: the base grows with the length, once that exceeds the original context."""
    lengths = (positions.double() + 1).clamp(min=rope.original_context)
    growth = rope.factor * lengths / rope.original_context - (rope.factor - 1)
    bases = rope.theta * growth ** (head_dim / (head_dim - 2))
    return (1.0 / bases[:, None] ** exponents.double()).float()


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended linearly in rotations."""
    rotations = rope.original_context * frequencies / (2 * math.pi)
    keep = ((rotations - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _yarn(rope: Rope, head_dim: int, frequencies: Tensor) -> Tensor:
    """NTK by parts (arXiv:2309.00071, section 3.2): the same blend, with a ramp over dimensions."""

    def dimension(rotations: float) -> float:
        """Where a dimension turns `rotations` times over the original context."""
        return head_dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # the ramp may be a step
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies * (1 - stretch) + frequencies / rope.factor * stretch
