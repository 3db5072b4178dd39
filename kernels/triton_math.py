"""What every kernel needs of arithmetic, such that it is right on a GPU and in Triton's interpreter.

The interpreter keeps bf16 and fp8 as integers and goes wrong without a word: it multiplies bit patterns, and it cuts
off where it should round. So kernels load into fp32, multiply with `dot` and store through `rounded`, which in the
interpreter do with integers what the GPU's own conversions do. On a GPU the branches are resolved when it compiles.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import os

import triton
import triton.language as tl

from kernels.backend import INTERPRETED

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton up to 3.9 does; 3.10 would round products, unasked

INTERP = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b, in fp32. Operands are both of one 16-bit type, or fp32, which is not multiplied as tf32."""
    if INTERP:
        return accumulator + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x as `dtype`, to the nearest and to even between two; e4m3 saturates at 448."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        return _to_e4m3(x) if INTERP else x.to(dtype)
    if dtype == tl.bfloat16 and INTERP:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _to_e4m3(x):
    """x within +-448. Adding and subtracting 2^(exponent + 20) rounds to three bits of mantissa, as fp32 addition
    rounds to 23; the exponent is at least that of the smallest normal number, 2^-6, below which steps stay the same."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    exponent = tl.maximum((bits >> 23) & 0xFF, 121)  # biased; 121 is 2^-6
    magnitude = tl.abs(x)
    shift = ((exponent + 20) << 23).to(tl.float32, bitcast=True)
    value = (magnitude + shift) - shift
    exact = value.to(tl.uint32, bitcast=True)
    normal = ((exact >> 20) - (120 << 3)).to(tl.uint32)  # 8 exponent bits become 4: the bias goes from 127 to 7
    subnormal = (value * 512.0).to(tl.uint32)  # in steps of 2^-9
    code = tl.where(value < 0.015625, subnormal, normal) | sign
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
