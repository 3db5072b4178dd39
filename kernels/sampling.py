"""Drawing tokens: counter-based noise, so that a draw is a function of its coordinates and nothing else.

argmax(logits / temperature + gumbel) is a draw from the softmax. The noise of (seed, position, token) comes from an
integer hash of the three, computed element by element: the same on any machine, in any batch, and for any subset of the
vocabulary, which is what lets a sequence resume on another worker with the same tokens. Penalties, biases and who
wants what belong to the caller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.backend import uses_triton

WORD = 0xFFFFFFFF
MULTIPLIER = 0x045D9F3B  # below 2^31, so that its product with a 32-bit word fits int64: no overflow to rely on
UNIFORM_BITS = 23  # k + 1/2 is exact in fp32 for k below 2^23, so no uniform rounds to 0 or 1
GREEDY_TEMPERATURE = 1e-5  # below this a softmax is an argmax in fp32 anyway


def gumbel(seed: int, position: int, token_ids: Tensor) -> Tensor:  # [N] int64 -> [N] fp32
    """Standard Gumbel noise. `reference.gumbel` says the same for one token in Python integers."""
    return _noise(*key(seed, position), token_ids)


def key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words of a (seed, position): splitmix64's finalizer, twice."""
    word = _finalize(_finalize(seed) ^ position)
    return word & WORD, word >> 32


def sample_rows(
    logits: Tensor,  # [R, V], fp32, fp16 or bf16
    temperature: Tensor,  # [R] fp32 or fp64; below GREEDY_TEMPERATURE, the first of the largest logits is taken
    top_k: Tensor,  # [R] int32; 0: all, 1: greedy
    top_p: Tensor,  # [R] fp32 or fp64; 1: all
    min_p: Tensor,  # [R] fp32 or fp64; 0: all
    words: Tensor,  # [R, 2] int64 or int32 (the same bits): `key` of the row's seed and position
) -> Tensor:  # [R] int64
    """One token per row, a function of the row alone: min-p, then top-k, then top-p filter and take shares of what the
    one before left, equal logits live or die together, and the noise draws among the survivors. On a GPU the same token
    as on a CPU, unless two candidates' sums of logit and noise lie within a few units in the last place."""
    if uses_triton(logits):
        from kernels import triton_sampling

        return triton_sampling.sample_rows(logits, temperature, top_k, top_p, min_p, words)
    settings = zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), words.tolist(), strict=True)
    tokens = [_sample_row(row.float(), *each) for row, each in zip(logits, settings, strict=True)]
    return torch.tensor(tokens, dtype=torch.int64)


def _sample_row(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, words: list[int]) -> int:
    if temperature < GREEDY_TEMPERATURE or top_k == 1:
        return int(logits.argmax())
    values = logits / temperature
    token_ids = (values >= _floor(values, top_k, top_p, min_p)).nonzero()[:, 0]
    noise = _noise(words[0] & WORD, words[1] & WORD, token_ids)
    return int(token_ids[(values[token_ids] + noise).argmax()])


def _floor(values: Tensor, top_k: int, top_p: float, min_p: float) -> float:  # [V]
    """What a logit must reach to survive the filters."""
    peak = values.max()
    floor = float(peak) + math.log(min_p) if min_p > 0 else -math.inf
    ordered = values.sort(descending=True).values
    if 0 < top_k < len(values):
        floor = max(floor, float(ordered[top_k - 1]))
    if top_p < 1:
        shares = (ordered - peak).exp()
        mass = shares.masked_fill(ordered < floor, 0).sum(dtype=torch.float64)
        reached = (shares.cumsum(0, dtype=torch.float64) >= top_p * mass).nonzero()[:, 0]
        floor = max(floor, float(ordered[reached[0]])) if len(reached) else floor
    return floor


def _noise(first: int, second: int, token_ids: Tensor) -> Tensor:  # [N] int64 -> [N] fp32
    x = token_ids ^ first
    _mix_inplace(x)
    x ^= second
    _mix_inplace(x)
    x ^= x >> 16
    uniform = ((x >> (32 - UNIFORM_BITS)).to(torch.float32) + 0.5) * 2.0**-UNIFORM_BITS
    return uniform.log_().neg_().log_().neg_()


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
