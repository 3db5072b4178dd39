"""SwiGLU's gate, silu(gate) * up, as one Triton kernel.

Contract   y = gate / (1 + exp(-gate)) * up in fp32, rounded once.
Layout     gate_up [T, 2 I], gate first, rows with any stride; y [T, I] contiguous. A program is a run of one row.
Floor      3 T I values moved: 6 T I bytes in bf16. About 6 FLOPs per value.
Source     arXiv:2002.05202.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import rounded

LAUNCH = {"block": 1024, "num_warps": 4}  # 8 values per thread: one 128-bit load of 16-bit values


@triton.jit
def silu_and_mul_kernel(gate_up, y, row_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    pair = gate_up + row * row_stride + at
    gate = tl.load(pair, inside, 0.0).to(tl.float32)
    up = tl.load(pair + columns, inside, 0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * columns + at, rounded(product, y.dtype.element_ty), inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [T, 2 I] -> [T, I]
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(tokens, columns, dtype=gate_up.dtype, device=gate_up.device)
    block = LAUNCH["block"]
    if tokens:
        silu_and_mul_kernel[(tokens, triton.cdiv(columns, block))](
            gate_up, y, gate_up.stride(0), columns, BLOCK=block, num_warps=LAUNCH["num_warps"]
        )
    return y
