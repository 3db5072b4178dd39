"""Quantization of rows to int8 or e4m3 with one scale each, and back, as Triton kernels.

Contract   The bytes of `kernels.quantization`: scale = max |row| / 127 (448 for e4m3), level = value / scale to the
           nearest, to even between two; a row of zeros has scale 0. Divisions are IEEE's, not the GPU's fast ones.
Layout     values and levels [rows, D] contiguous, scales [rows] fp32. A program is a tile of whole rows.
Floor      3 bytes moved per value in bf16, and 4 per row. About 4 operations per value.
Source     `kernels/quantization.py`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import rounded

LAUNCH = {"tile": 4096, "num_warps": 4}  # values of a program: 32 per thread

ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added and subtracted, it rounds to an integer as fp32 addition rounds


@triton.jit
def scale_of(peak, dtype: tl.constexpr):
    """fp32 scale of a row whose largest magnitude is `peak`."""
    if dtype == tl.int8:
        return tl.div_rn(peak, 127.0)
    return tl.div_rn(peak, 448.0)


@triton.jit
def level_of(x, scale, dtype: tl.constexpr):
    """fp32 x and scale -> `dtype`, int8 or e4m3."""
    level = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0))
    if dtype == tl.int8:
        level = (level + ROUNDER) - ROUNDER
        return tl.minimum(tl.maximum(level, -127.0), 127.0).to(tl.int8)
    return rounded(level, dtype)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(values, levels, scales, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (at[None, :] < columns)
    cells = row[:, None] * columns + at[None, :]
    x = tl.load(values + cells, inside, 0.0).to(tl.float32)
    dtype = levels.dtype.element_ty
    scale = scale_of(tl.max(tl.abs(x), 1), dtype)
    tl.store(scales + row, scale, row < rows)
    tl.store(levels + cells, level_of(x, scale[:, None], dtype), inside)


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(levels, scales, values, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (at[None, :] < columns)
    cells = row[:, None] * columns + at[None, :]
    scale = tl.load(scales + row, row < rows, 0.0)
    x = tl.load(levels + cells, inside, 0.0).to(tl.float32) * scale[:, None]
    tl.store(values + cells, rounded(x, values.dtype.element_ty), inside)


def quantize(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # [..., D] -> [..., D], fp32 [...]
    values = values.contiguous()
    levels = torch.empty(values.shape, dtype=dtype, device=values.device)
    scales = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    _launch(quantize_kernel, (values, levels, scales), values)
    return levels, scales


def dequantize(levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:  # [..., D], fp32 [...] -> [..., D]
    values = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    _launch(dequantize_kernel, (levels.contiguous(), scales.contiguous(), values), values)
    return values


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, Tensor, Tensor], shaped: Tensor) -> None:
    columns = shaped.shape[-1]
    count = shaped.numel() // columns if columns else 0
    if not count:
        return
    block = triton.next_power_of_2(columns)
    rows = max(1, LAUNCH["tile"] // block)
    kernel[(triton.cdiv(count, rows),)](*tensors, count, columns, ROWS=rows, BLOCK=block, num_warps=LAUNCH["num_warps"])
