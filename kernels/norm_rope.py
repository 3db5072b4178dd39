"""Normalisation, rotary position embedding, and the write of keys and values into the KV cache that follows it.

rms_norm               y = x / sqrt(mean(x^2) + epsilon) * weight, statistics in fp32
add_rms_norm_inplace   the residual addition before it, in one pass on a GPU
rope_inplace           rotates each pair (x[i], x[i + D/2]) of a head by its position's angle ("half split", as Hugging
                       Face checkpoints expect; GGUF's interleaved order must be un-permuted before it gets here)
rope_write_inplace     a layer's fused projection into rotated queries and a filled cache, in one pass on a GPU

Which slot is whose, and angles themselves, are the caller's business.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import uses_triton
from kernels.quantization import quantize


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, gemma: bool = False) -> Tensor:
    """x [..., C], weight broadcastable to it -> [..., C]. Rounds before it multiplies by the weight, as Hugging Face
    does for all but Gemma, whose factor is 1 + weight, in fp32. A weight per head [H, C] is fine too."""
    if uses_triton(x):
        from kernels import triton_norm

        return triton_norm.rms_norm(x, weight, epsilon, gemma)
    if gemma:
        return (F.rms_norm(x.float(), x.shape[-1:], None, epsilon) * (1 + weight.float())).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], None, epsilon) * weight


def add_rms_norm_inplace(hidden: Tensor, x: Tensor, weight: Tensor, epsilon: float, *, gemma: bool = False) -> Tensor:
    """hidden += x, and `rms_norm` of the sum as it is stored.  [..., C], [..., C], [C] -> [..., C]"""
    if uses_triton(hidden):
        from kernels import triton_norm

        return triton_norm.add_rms_norm_inplace(hidden, x, weight, epsilon, gemma)
    hidden += x
    return rms_norm(hidden, weight, epsilon, gemma=gemma)


def rope_inplace(x: Tensor, cos: Tensor, sin: Tensor) -> None:  # [T, H, D], [T, D], [T, D]
    """`sin` comes negated in its first half, so that a roll by D/2 serves both halves of the rotation."""
    rolled = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos[:, None]).addcmul_(rolled, sin[:, None])


def rope_write_inplace(
    qkv: Tensor,  # [T, Hq + 2 Hkv, D]; its queries and keys are rotated in place
    table: Tensor,  # [positions, 2, D]: cosines, and sines negated in the first half
    positions: Tensor,  # [T]
    cache: Tensor,  # [blocks, Hkv, layers, 2, block size, D], of qkv's dtype, or int8 or float8_e4m3fn with scales
    layer: int,
    slots: Tensor,  # [T] int32: block * block size + place in it; -1: the row writes nothing
    heads: int,
    kv_heads: int,
    qk_norm: Tensor | None,  # [Hq + Hkv, D]: RMSNorm of every query and key head before the rotation
    epsilon: float,
    scales: Tensor | None = None,  # [blocks, Hkv, layers, 2, block size] fp32
) -> None:
    """What a quantized cache gets are the values as qkv would store them, so that a scale belongs to one token and head
    and a block's bytes never depend on who else was in the batch. No two rows have the same slot."""
    if (cache.dtype != qkv.dtype) != (scales is not None):
        raise ValueError(
            f"a cache of {cache.dtype} with qkv of {qkv.dtype} needs scales, one of the same dtype has none"
        )
    if uses_triton(qkv):
        from kernels import triton_rope

        triton_rope.rope_write_inplace(
            qkv, table, positions, cache[:, :, layer], slots, heads, kv_heads, qk_norm, epsilon,
            None if scales is None else scales[:, :, layer],
        )  # fmt: skip
        return
    qk = qkv[:, : heads + kv_heads]
    if qk_norm is not None:
        qk.copy_(rms_norm(qk, qk_norm, epsilon))
    rope_inplace(qk, *table.index_select(0, positions).unbind(1))
    rows = (slots >= 0).nonzero()[:, 0]
    kv = qkv.index_select(0, rows)[:, heads:].view(-1, 2, kv_heads, qkv.shape[-1]).transpose(1, 2)  # [N, Hkv, 2, D]
    blocks, places = (slots[rows] // cache.shape[4]).long(), (slots[rows] % cache.shape[4]).long()
    if scales is not None:
        kv, kv_scales = quantize(kv, cache.dtype)
        scales[:, :, layer].transpose(1, 3)[blocks, places] = kv_scales.transpose(1, 2)
    cache[:, :, layer].transpose(1, 3)[blocks, places] = kv.transpose(1, 2)
