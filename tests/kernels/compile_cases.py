"""What the compile suite launches: for each Triton file, every launch configuration in its tables, and dtypes and head
sizes that change the code. The launches are the public functions' own, on tensors without memory.

All for sm_90, which the configurations are chosen for; sm_80 and sm_100 for one of each file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.block_copy import gather_blocks, scatter_blocks
from kernels.norm_rope import add_rms_norm_inplace, rms_norm, rope_write_inplace
from kernels.paged_attention import PagedStep, attend, decode_items, prefill_tiles
from kernels.quantization import dequantize, quantize
from kernels.sampling import sample_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32", INT8: "int8", E4M3: "e4m3"}
ALL = (80, 90, 100)
BLOCKS, LAYERS, KV_HEADS = 8, 2, 4


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    launch: Callable[[], object]
    architectures: tuple[int, ...] = (90,)
    tensor: Mapping[int, str] = field(default_factory=dict)  # architecture -> an instruction that one kernel must have


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _ints(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int32)


def _attend(
    queries: int, dtype: torch.dtype, kv: torch.dtype, dim: int, group: int, block_size: int, window: int
) -> None:
    """Two sequences with that many queries each."""
    lengths, starts = np.array([40, 41], np.int32), np.array([0, queries, 2 * queries], np.int32)
    decodes = 2 if queries == 1 else 0
    items, item_starts = decode_items(lengths[:decodes])
    tiles = prefill_tiles(lengths, starts, decodes, group)
    step = PagedStep(
        _ints(2, 4), _ints(2), _ints(3), decodes, _ints(*items.shape), _ints(*item_starts.shape), _ints(*tiles.shape)
    )
    cache = _empty(BLOCKS, KV_HEADS, LAYERS, 2, block_size, dim, dtype=kv)
    scales = _empty(*cache.shape[:-1], dtype=FP32) if kv in (INT8, E4M3) else None
    heads = KV_HEADS * group
    q = _empty(2 * queries, heads + 2 * KV_HEADS, dim, dtype=dtype)[:, :heads]
    attend(q, cache, 1, step, 0.1, window, scales)


def _attention(queries: int, instructions: Mapping[int, str]) -> list[Case]:
    """One case per entry of the kernel's table, and what else is compiled differently. No tensor core multiplies fp32
    exactly."""

    def case(dtype: torch.dtype, kv: torch.dtype, dim: int, group: int, block_size: int = 16, window: int = 0) -> Case:
        everywhere = (dtype, kv, dim, group, block_size) == (BF16, BF16, 128, 4, 16)
        return Case(
            f"{SHORT[dtype]} q, {SHORT[kv]} KV, D {dim}, {group} heads, blocks of {block_size}"
            + (", window" if window else ""),
            lambda: _attend(queries, dtype, kv, dim, group, block_size, window),
            ALL if everywhere else (90,),
            {} if dtype is FP32 else instructions if everywhere else {90: instructions[90]},
        )

    return [
        case(BF16, BF16, 128, 4),
        case(BF16, BF16, 128, 4, window=32),
        case(BF16, BF16, 128, 4, 64),
        case(BF16, E4M3, 128, 4),
        case(BF16, INT8, 128, 4),
        case(FP32, FP32, 128, 4),
        case(BF16, BF16, 64, 3),
        case(BF16, INT8, 64, 3),
        case(FP32, FP32, 64, 3),
        case(FP16, FP16, 96, 1),
        case(BF16, BF16, 80, 16),
        case(BF16, BF16, 256, 8),
        case(BF16, E4M3, 256, 8),
        case(FP32, FP32, 256, 8),
    ]


def _norms() -> list[Case]:
    def add(hidden: int, gemma: bool = False) -> Callable[[], object]:
        return lambda: add_rms_norm_inplace(_empty(3, hidden), _empty(3, hidden), _empty(hidden), 1e-5, gemma=gemma)

    def alone(hidden: int) -> Callable[[], object]:
        return lambda: rms_norm(_empty(3, hidden), _empty(hidden), 1e-5)

    sizes = (512, 576, 2048, 4096, 8192, 16_384)
    return [
        *(Case(f"add, {hidden}", add(hidden), ALL if hidden == 4096 else (90,)) for hidden in sizes),
        Case("add, Gemma, 4096", add(4096, True)),
        Case("alone, 4096", alone(4096)),
    ]


def _rope(kv: torch.dtype, dim: int, normed: bool) -> None:
    heads = 3 * KV_HEADS
    cache = _empty(BLOCKS, KV_HEADS, LAYERS, 2, 16, dim, dtype=kv)
    rope_write_inplace(
        _empty(5, heads + 2 * KV_HEADS, dim),
        _empty(64, 2, dim),
        _ints(5),
        cache,
        1,
        _ints(5),
        heads,
        KV_HEADS,
        _empty(heads + KV_HEADS, dim) if normed else None,
        1e-5,
        _empty(*cache.shape[:-1], dtype=FP32) if kv in (INT8, E4M3) else None,
    )


def _ropes() -> list[Case]:
    wanted = [(BF16, 128, False), (BF16, 128, True), (E4M3, 128, False), (INT8, 128, False), (BF16, 64, False)]
    wanted += [(BF16, 80, True), (BF16, 256, False)]
    return [
        Case(
            f"{SHORT[kv]} KV, D {dim}{', normed' if normed else ''}",
            lambda kv=kv, dim=dim, normed=normed: _rope(kv, dim, normed),  # type: ignore[misc]
            ALL if (kv, dim, normed) == (BF16, 128, False) else (90,),
        )
        for kv, dim, normed in wanted
    ]


def _copy(gather: bool) -> None:
    cache = _empty(BLOCKS, KV_HEADS, LAYERS, 2, 16, 128)
    run = _empty(3, cache[0].numel())
    (gather_blocks if gather else scatter_blocks)(cache, _ints(3), run)


def _sample(dtype: torch.dtype) -> None:
    rows = 3
    settings = [_empty(rows, dtype=FP32), _ints(rows), _empty(rows, dtype=FP32), _empty(rows, dtype=FP32)]
    sample_rows(_empty(rows, 128_256, dtype=dtype), *settings, _ints(rows, 2))


FAMILIES: dict[str, Callable[[], list[Case]]] = {
    "triton_decode": lambda: _attention(1, {80: "HMMA", 90: "HMMA", 100: "HMMA"}),
    "triton_prefill": lambda: _attention(9, {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}),
    "triton_norm": _norms,
    "triton_rope": _ropes,
    "triton_activation": lambda: [
        Case("bf16, 14336", lambda: silu_and_mul(_empty(3, 2 * 14_336)), ALL),
        Case("fp32, 1536", lambda: silu_and_mul(_empty(3, 2 * 1536, dtype=FP32))),
    ],
    "triton_block_copy": lambda: [
        Case("gather", lambda: _copy(True), ALL),
        Case("scatter", lambda: _copy(False)),
    ],
    "triton_quantization": lambda: [
        Case("quantize, D 128", lambda: quantize(_empty(64, 128)), ALL),
        Case("dequantize, D 128", lambda: dequantize(_empty(64, 128, dtype=INT8), _empty(64, dtype=FP32), BF16)),
    ],
    "triton_sampling": lambda: [
        Case("bf16", lambda: _sample(BF16), ALL),
        Case("fp32", lambda: _sample(FP32)),
    ],
}
