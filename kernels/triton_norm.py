"""RMSNorm of rows, by itself or with the residual addition before it, as one Triton kernel.

Contract   y = rms_norm(x, weight); or hidden += x in place, y = rms_norm(hidden). Statistics in fp32. What is rounded
           where is Hugging Face's: the residual stream as it is stored is what is normalised, and either the
           normalised value is rounded and then multiplied by the weight (Llama) or multiplied by 1 + weight in fp32
           (Gemma). Not for rows of more than 16,384 values.
Layout     x [A, B, C] with any strides but C's, which is 1; weight [C], or [B, C] with one row per head; y contiguous.
           One program per row, the whole row in registers: a row's result does not depend on how many there are.
Floor      2 rows of bytes moved per row alone, 4 with the residual: 8 T C bytes in bf16. About 6 FLOPs per value.
Source     arXiv:1910.07467. Rounding: `LlamaRMSNorm` and `GemmaRMSNorm` of transformers.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import rounded

# values of a row, as a power of two -> warps: 128-bit loads, and 16 values per thread; more would spill
LAUNCH = {512: 1, 1024: 2, 2048: 4, 4096: 8, 8192: 16, 16384: 32}


@triton.jit
def norm_kernel(
    x,
    hidden,
    weight,
    y,
    epsilon,
    columns,
    inner,  # B
    x_outer,
    x_inner,
    hidden_outer,
    hidden_inner,
    weight_inner,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GEMMA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a, b = row // inner, row % inner
    at = tl.arange(0, BLOCK)
    inside = at < columns
    dtype = y.dtype.element_ty
    values = tl.load(x + a * x_outer + b * x_inner + at, inside, 0.0).to(tl.float32)
    if ADD:
        stream = hidden + a * hidden_outer + b * hidden_inner + at
        stored = rounded(tl.load(stream, inside, 0.0).to(tl.float32) + values, dtype)
        tl.store(stream, stored, inside)
        values = stored.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 0) / columns + epsilon)
    weights = tl.load(weight + b * weight_inner + at, inside, 0.0).to(tl.float32)
    normed = values * factor * (1.0 + weights) if GEMMA else rounded(values * factor, dtype).to(tl.float32) * weights
    tl.store(y + row * columns + at, rounded(normed, dtype), inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:  # [..., C], [C] or [B, C] -> [..., C]
    return _norm(None, x, weight, epsilon, gemma)


def add_rms_norm_inplace(hidden: Tensor, x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
    """hidden, x [..., C], weight [C] -> [..., C]."""
    return _norm(hidden, x, weight, epsilon, gemma)


def _norm(hidden: Tensor | None, x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, stream = _rows(x), _rows(x if hidden is None else hidden)
    columns = x.shape[-1]
    block = max(min(LAUNCH), triton.next_power_of_2(columns))
    if block not in LAUNCH:
        raise ValueError(f"rows of {columns} values are too long for this kernel; it takes up to {max(LAUNCH)}")
    if weight.dim() == 2 and weight.shape[0] != rows.shape[1]:
        raise ValueError(f"a weight for each of {weight.shape[0]} heads does not fit x of shape {[*x.shape]}")
    if y.numel() == 0:
        return y
    norm_kernel[(rows.shape[0] * rows.shape[1],)](
        rows,
        stream,
        weight,
        y,
        epsilon,
        columns,
        rows.shape[1],
        *rows.stride()[:2],
        *stream.stride()[:2],
        weight.stride(0) if weight.dim() == 2 else 0,
        BLOCK=block,
        ADD=hidden is not None,
        GEMMA=gemma,
        num_warps=LAUNCH[block],
    )
    return y


def _rows(x: Tensor) -> Tensor:  # [..., C] -> the same memory as [A, B, C]
    if x.dim() == 3:
        return x
    return x.view(-1, 1, x.shape[-1])
