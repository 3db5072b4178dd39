"""Normalisation and rotary position embedding.

rms_norm      y = x / sqrt(mean(x^2) + epsilon) * weight, statistics in fp32
rope_inplace  rotates each pair (x[i], x[i + D/2]) of a head by its position's angle ("half split", as Hugging
              Face checkpoints expect; GGUF's interleaved order must be un-permuted before it gets here)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # [..., C], broadcastable to it -> [..., C]
    """Rounds before it multiplies by the weight, as Hugging Face does. A weight per head [H, C] is fine too."""
    return F.rms_norm(x, x.shape[-1:], None, epsilon) * weight


def rope_inplace(x: Tensor, cos: Tensor, sin: Tensor) -> None:  # [T, H, D], [T, D], [T, D]
    """`sin` comes negated in its first half, so that a roll by D/2 serves both halves of the rotation."""
    rolled = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos[:, None]).addcmul_(rolled, sin[:, None])
