"""Rows of what lies between the matrix products: norms, rotation and KV write, the gate. All are bound by bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.bench.cuda import peers
from deploy.bench.cuda.paged import EIGHT_BITS, Heads
from deploy.bench.cuda.rows import Call, Case, Row, error, sets
from kernels.activation import silu_and_mul
from kernels.norm_rope import add_rms_norm_inplace, rope_write_inplace

EPSILON = 1e-5
HEADS = Heads(32, 8, 128)
BLOCK_SIZE = 16
CONTEXT = 8192  # positions of the rotary table
COMPARED = (
    (8192, 4096),
    (8192, 14_336),
)  # shapes of the norm and of the gate that torch.compile, which is slow, has too
TOLERANCE = 4e-3  # half a step of bfloat16 is 2^-9 of a value


def rows() -> list[Row]:
    norms = [_norm(t, h) for t in (1, 64, 8192) for h in (576, 4096, 8192)]
    ropes = [_rope(t, dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8) for t in (64, 8192)]
    return norms + ropes + [_gate(t, i) for t in (64, 8192) for i in (1536, 14_336)]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _row(
    kernel: str, shape: str, moved: float, flop: float, build: Callable[[], Case], gate: float, most_us: float
) -> Row:
    """The gate is for what does not fit into the cache, `most_us` for a step of few tokens; between them is neither."""
    large, small = moved >= 64e6, moved < 8e6
    return Row(kernel, shape, moved, flop, build, gate if large else None, most_us if small else None)


def _norm(tokens: int, hidden: int) -> Row:
    moved = 8.0 * tokens * hidden
    build = functools.partial(_build_norm, tokens, hidden, sets(moved))
    return _row("add + RMSNorm", f"{tokens} x {hidden}", moved, 6.0 * tokens * hidden, build, 0.88, 3.0)


def _build_norm(tokens: int, hidden: int, count: int) -> Case:
    weight = _random(hidden)
    inputs = [(_random(tokens, hidden), _random(tokens, hidden)) for _ in range(count)]

    def check() -> float:
        residual, x = _random(tokens, hidden), _random(tokens, hidden)
        summed = residual + x
        y = add_rms_norm_inplace(residual, x, weight, EPSILON)
        wanted = F.rms_norm(summed.float(), (hidden,), None, EPSILON) * weight.float()
        return max(error(residual, summed), error(y, wanted))

    def plain(residual: Tensor, x: Tensor) -> Tensor:
        residual += x
        return F.rms_norm(residual, (hidden,), None, EPSILON) * weight

    def call(residual: Tensor, x: Tensor) -> Call:
        return lambda: add_rms_norm_inplace(residual, x, weight, EPSILON)

    named = {"torch.compile": functools.partial(peers.compiled, plain, inputs)}
    return Case([call(*each) for each in inputs], check, TOLERANCE, named if (tokens, hidden) == COMPARED[0] else {})


def _rope(tokens: int, dtype: torch.dtype) -> Row:
    rows, written = HEADS.queries + 2 * HEADS.keys, 2 * HEADS.keys
    read = tokens * rows * HEADS.dim * 2 + tokens * 2 * HEADS.dim * 2  # q, k, v; cosines and sines
    scales = 4 * tokens * written if dtype in EIGHT_BITS else 0
    moved = float(
        read + tokens * HEADS.queries * HEADS.dim * 2 + tokens * written * HEADS.dim * dtype.itemsize + scales
    )
    name = f"{tokens} tokens, {HEADS}, KV {str(dtype).removeprefix('torch.')}"
    build = functools.partial(_build_rope, tokens, dtype, sets(moved))
    return _row("RoPE + KV write", name, moved, 3.0 * tokens * rows * HEADS.dim, build, 0.75, 4.0)


def _build_rope(tokens: int, dtype: torch.dtype, count: int) -> Case:
    blocks = -(-tokens // BLOCK_SIZE)
    cache = torch.zeros(blocks, HEADS.keys, count, 2, BLOCK_SIZE, HEADS.dim, dtype=dtype, device="cuda")
    scales = torch.zeros(cache.shape[:-1], device="cuda") if dtype in EIGHT_BITS else None
    angles = torch.rand(CONTEXT, HEADS.dim // 2, device="cuda") * 6.28
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).bfloat16()
    positions = torch.randint(0, CONTEXT, (tokens,), dtype=torch.int32, device="cuda")
    slots = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:tokens].int()
    inputs = [_random(tokens, HEADS.queries + 2 * HEADS.keys, HEADS.dim) for _ in range(count)]

    def write(qkv: Tensor, layer: int) -> None:
        heads = (HEADS.queries, HEADS.keys)
        rope_write_inplace(qkv, table, positions, cache, layer, slots, *heads, None, EPSILON, scales)

    def check() -> float:
        qkv = _random(*inputs[0].shape)
        rotated = plain(qkv.clone())
        write(qkv, 0)
        at = slots.long()
        kv = cache[at // BLOCK_SIZE, :, 0, :, at % BLOCK_SIZE].float()  # [T, Hkv, 2, D]
        if scales is not None:
            kv = kv * scales[at // BLOCK_SIZE, :, 0, :, at % BLOCK_SIZE].unsqueeze(-1)
        wanted = rotated[:, HEADS.queries :].view(tokens, 2, HEADS.keys, HEADS.dim).transpose(1, 2)
        of_queries = error(qkv[:, : HEADS.queries], rotated[:, : HEADS.queries])
        return max(of_queries, error(kv, wanted) * (TOLERANCE / most))  # what 8 bits lose is allowed for

    def plain(qkv: Tensor) -> Tensor:
        turned = qkv[:, : HEADS.queries + HEADS.keys].float()
        first, second = table[positions.long()].float()[:, :, None].unbind(1)
        qkv[:, : HEADS.queries + HEADS.keys] = turned * first + turned.roll(HEADS.dim // 2, -1) * second
        return qkv

    most = {torch.bfloat16: TOLERANCE, torch.int8: 2e-2, torch.float8_e4m3fn: 4e-2}[dtype]
    calls: list[Call] = [functools.partial(write, qkv, layer) for layer, qkv in enumerate(inputs)]
    return Case(calls, check, TOLERANCE)


def _gate(tokens: int, width: int) -> Row:
    moved = 6.0 * tokens * width
    build = functools.partial(_build_gate, tokens, width, sets(moved))
    return _row("SwiGLU", f"{tokens} x {width}", moved, 6.0 * tokens * width, build, 0.90, 3.0)


def _build_gate(tokens: int, width: int, count: int) -> Case:
    inputs = [_random(tokens, 2 * width) for _ in range(count)]

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def check() -> float:
        return error(silu_and_mul(inputs[0]), plain(inputs[0].float()))

    calls: Sequence[Call] = [functools.partial(silu_and_mul, each) for each in inputs]
    named = {"torch.compile": functools.partial(peers.compiled, plain, [(each,) for each in inputs])}
    return Case(calls, check, TOLERANCE, named if (tokens, width) == COMPARED[1] else {})
