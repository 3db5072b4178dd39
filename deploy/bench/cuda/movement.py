"""Rows of what moves KV within device memory: blocks gathered and scattered for a handoff, and their quantization.

A block is one of Llama 3 8B: 8 heads x 32 layers x 16 tokens x 128 dimensions, 2 MiB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from deploy.bench.cuda.rows import Call, Case, Row, error
from kernels.block_copy import gather_blocks, scatter_blocks
from kernels.quantization import dequantize, quantize

HEADS, LAYERS, DIM = 8, 32, 128
BLOCK_SIZES = (16, 64)  # tokens
PAYLOAD_BYTES = 512 * 2**20
POOL = 4  # times the payload: the blocks come from all over it


def rows() -> list[Row]:
    found = [_row(kind, size) for size in BLOCK_SIZES for kind in ("gather", "scatter")]
    elements = PAYLOAD_BYTES // 2
    found.append(
        Row(
            kernel="quantize KV",
            shape=f"{PAYLOAD_BYTES >> 20} MiB of bfloat16, one scale per {DIM}",
            moved=elements * 3.0 + elements / DIM * 4,
            flop=4.0 * elements,
            build=functools.partial(_build_quantize, elements),
            gate=0.80,
        )
    )
    return found


def _row(kind: str, size: int) -> Row:
    return Row(
        kernel=f"{kind} blocks",
        shape=f"{PAYLOAD_BYTES >> 20} MiB, blocks of {size}",
        moved=2.0 * PAYLOAD_BYTES,
        flop=0.0,
        build=functools.partial(_build, kind, size),
        gate=0.85,
    )


def _build(kind: str, size: int) -> Case:
    shape = (HEADS, LAYERS, 2, size, DIM)
    elements = HEADS * LAYERS * 2 * size * DIM
    count = PAYLOAD_BYTES // (2 * elements)
    cache = torch.randn(POOL * count, *shape, dtype=torch.bfloat16, device="cuda")
    staging = torch.randn(count, elements, dtype=torch.bfloat16, device="cuda")
    orders = [torch.randperm(POOL * count, device="cuda")[:count].int() for _ in range(POOL)]

    def call(ids: torch.Tensor) -> Call:
        if kind == "gather":
            return lambda: gather_blocks(cache, ids, staging)
        return lambda: scatter_blocks(cache, ids, staging)

    def check() -> float:
        call(orders[0])()
        return error(cache.view(POOL * count, -1)[orders[0].long()], staging)

    def select(ids: torch.Tensor) -> Call:
        flat = cache.view(POOL * count, -1)
        wide = ids.long()
        if kind == "gather":
            return lambda: torch.index_select(flat, 0, wide, out=staging)
        return lambda: flat.index_copy_(0, wide, staging)

    peers: dict[str, Callable[[], Sequence[Call]]] = {
        "index_select" if kind == "gather" else "index_copy_": lambda: [select(ids) for ids in orders],
        "contiguous copy": lambda: [lambda: staging.copy_(cache.view(-1, elements)[:count])],
    }
    return Case([call(ids) for ids in orders], check, 0.0, peers)


def _build_quantize(elements: int) -> Case:
    values = torch.randn(elements // DIM, DIM, dtype=torch.bfloat16, device="cuda")

    def check() -> float:
        """Relative error of the round trip: half a step of a row's largest / 127."""
        levels, scales = quantize(values)
        return error(dequantize(levels, scales, torch.float32), values)

    def plain() -> object:
        wide = values.float()
        scales = wide.abs().amax(-1, keepdim=True) / 127
        return (wide / scales).round().clamp(-127, 127).to(torch.int8), scales

    return Case([lambda: quantize(values)], check, 1e-2, {"torch": lambda: [plain]})
