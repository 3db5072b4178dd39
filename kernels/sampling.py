"""Noise for drawing tokens: counter-based, so that a draw is a function of its coordinates and nothing else.

argmax(logits / temperature + gumbel) is a draw from the softmax. The noise of (seed, position, token) comes from an
integer hash of the three, computed element by element: the same on any machine, in any batch, and for any subset of the
vocabulary, which is what lets a sequence resume on another worker with the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIER = 0x045D9F3B  # below 2^31, so that its product with a 32-bit word fits int64: no overflow to rely on
UNIFORM_BITS = 23  # k + 1/2 is exact in fp32 for k below 2^23, so no uniform rounds to 0 or 1


def gumbel(seed: int, position: int, token_ids: Tensor) -> Tensor:  # [N] int64 -> [N] fp32
    """Standard Gumbel noise. `reference.gumbel` says the same for one token in Python integers."""
    first, second = key(seed, position)
    x = token_ids ^ first
    _mix_inplace(x)
    x ^= second
    _mix_inplace(x)
    x ^= x >> 16
    uniform = ((x >> (32 - UNIFORM_BITS)).to(torch.float32) + 0.5) * 2.0**-UNIFORM_BITS
    return uniform.log_().neg_().log_().neg_()


def key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words of a (seed, position): splitmix64's finalizer, twice."""
    word = _finalize(_finalize(seed) ^ position)
    return word & WORD, word >> 32


def _mix_inplace(x: Tensor) -> None:
    x ^= x >> 16
    x *= MULTIPLIER
    x &= WORD


def _finalize(x: int) -> int:
    bits = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & bits
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
    return x ^ (x >> 31)
