"""The oracle: every operation of this package as plainly as it can be written, in fp64. Slow, and meant to be.

T tokens of the flat batch      B sequences             S keys of a sequence
Hq query heads                  Hkv key-value heads     G = Hq / Hkv, heads that share keys
D dimensions of a head          C, N, K matrix sides    I intermediate size          V vocabulary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [T, K], [N, K], [N] -> [T, N]
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # [..., C], [C] -> [..., C]
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def rope(x: Tensor, angles: Tensor) -> Tensor:  # [T, H, D], [T, D/2] -> [T, H, D]
    first, second = x.double().chunk(2, -1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [T, 2 I] -> [T, I]
    gate, up = gate_up.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def attention(
    q: Tensor,  # [Hq, D], one query
    k: Tensor,  # [S, Hkv, D], the keys it may see: those up to its own position
    v: Tensor,  # [S, Hkv, D]
    scale: float,
    window: int,  # it sees the last `window` of them; 0: all
) -> Tensor:  # [Hq, D]
    k, v = k[-window:].double(), v[-window:].double()
    group = q.shape[0] // k.shape[1]
    heads = []
    for head, query in enumerate(q.double()):
        weights = torch.softmax(k[:, head // group] @ query * scale, 0)
        heads.append(weights @ v[:, head // group])
    return torch.stack(heads)


def attention_lse(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:  # [Hq, D], [S, Hkv, D] -> [Hq]
    """ln of the sum of exp(score) over the keys of `attention`, by which parts of it are weighed."""
    k = k[-window:].double().repeat_interleave(q.shape[0] // k.shape[1], 1)
    return torch.einsum("hd,shd->hs", q.double() * scale, k).logsumexp(-1)


def gumbel(words: tuple[int, int], token: int) -> float:
    """The noise of one token under the two 32-bit words that `kernels.sampling.key` gives."""
    first, second = words
    x = token ^ first
    x = ((x ^ (x >> 16)) * 0x045D9F3B) % 2**32 ^ second
    x = ((x ^ (x >> 16)) * 0x045D9F3B) % 2**32
    x ^= x >> 16
    uniform = ((x >> 9) + 0.5) / 2**23
    return -math.log(-math.log(uniform))
