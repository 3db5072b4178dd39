"""Rows of paged decode attention: one query per sequence, bound by reading the keys and values once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deploy.bench.cuda import peers
from deploy.bench.cuda.paged import Heads, Paged, attended, paged
from deploy.bench.cuda.rows import Call, Case, Row, error, sets
from kernels.paged_attention import CHUNK, attend

LLAMA = Heads(32, 8, 128)
LENGTHS = {
    "1 x 32k": (32_768,),
    "8 x 1k": (1024,) * 8,
    "16 x 8k": (8192,) * 16,
    "64 x 4k": (4096,) * 64,
    "256 x 1k": (1024,) * 256,
    "128 x 100 to 8k": tuple(int(n) for n in np.random.default_rng(1).integers(100, 8192, 128)),
}
LARGE = ("16 x 8k", "64 x 4k", "256 x 1k")
COMPARED = "64 x 4k"
LAYERS = 4  # of the cache, at least: a block's heads lie apart, as in a model
CHECKED = 4  # sequences
TOLERANCE = {torch.bfloat16: 5e-3, torch.int8: 1e-2, torch.float8_e4m3fn: 1e-2}


def rows() -> list[Row]:
    found = [_row(LLAMA, 16, lengths, torch.bfloat16) for lengths in LENGTHS]
    found += [_row(LLAMA, 64, lengths, torch.bfloat16) for lengths in LARGE if lengths != COMPARED]
    found += [_row(heads, 16, "64 x 4k", torch.bfloat16) for heads in (Heads(8, 8, 128), Heads(64, 8, 128))]
    found.append(_row(Heads(9, 3, 64), 16, "64 x 4k", torch.bfloat16))
    found += [_row(LLAMA, 16, lengths, dtype) for dtype in (torch.float8_e4m3fn, torch.int8) for lengths in LARGE]
    return [*found, _row(LLAMA, 64, COMPARED, torch.bfloat16, compared=True)]  # last: its peers take long to compile


def moved(lengths: Sequence[int], heads: Heads, itemsize: int) -> float:
    """Keys and values, and their scales when they have 8 bits; queries and outputs; partial results of sequences that
    are read in several chunks, written and read."""
    tokens, batch = sum(lengths), len(lengths)
    chunks = sum(-(-length // CHUNK) for length in lengths if length > CHUNK)
    kv = tokens * heads.keys * 2 * (heads.dim * itemsize + (4 if itemsize == 1 else 0))
    return kv + batch * heads.queries * heads.dim * 4 + 8 * chunks * heads.queries * (heads.dim + 2)


def _row(heads: Heads, block_size: int, name: str, dtype: torch.dtype, compared: bool = False) -> Row:
    """`compared`: with other paged kernels too."""
    lengths = LENGTHS[name]
    total = moved(lengths, heads, dtype.itemsize)
    small = total < 0.1e9
    return Row(
        kernel="decode",
        shape=f"{name}, {heads}, blocks of {block_size}, KV {str(dtype).removeprefix('torch.')}",
        moved=total,
        flop=4.0 * sum(lengths) * heads.queries * heads.dim,
        build=functools.partial(_build, heads, block_size, lengths, dtype, total, compared),
        gate=None if small else 0.60 if len(lengths) == 1 else 0.75,
        most_us=12.0 if small else None,
    )


def _build(
    heads: Heads, block_size: int, lengths: Sequence[int], dtype: torch.dtype, total: float, compared: bool
) -> Case:
    layers = max(LAYERS, sets(total))
    one = paged(lengths, [1] * len(lengths), heads, block_size, layers, dtype)
    q = torch.randn(len(lengths), heads.queries, heads.dim, dtype=torch.bfloat16, device="cuda")
    scale = heads.dim**-0.5
    calls = [_call(q, one, layer, scale) for layer in range(layers)]
    named: dict[str, Callable[[], Sequence[Call]]] = {}
    if dtype is torch.bfloat16 and len(set(lengths)) == 1:
        named["SDPA, dense"] = functools.partial(peers.sdpa_decode, len(lengths), lengths[0], heads, sets(total))
    if compared:
        named["FlexAttention, paged"] = functools.partial(peers.flex_decode, len(lengths), lengths[0], heads)
        named["FlashInfer, paged"] = functools.partial(peers.flashinfer_decode, q, one, lengths, heads)
    return Case(calls, functools.partial(_check, q, one, lengths, scale), TOLERANCE[dtype], named)


def _call(q: Tensor, one: Paged, layer: int, scale: float) -> Call:
    return lambda: attend(q, one.cache, layer, one.step, scale, 0, one.scales)


def _check(q: Tensor, one: Paged, lengths: Sequence[int], scale: float) -> float:
    layer = one.cache.shape[2] - 1
    out = attend(q, one.cache, layer, one.step, scale, 0, one.scales).view(q.shape)
    assert bool(out.isfinite().all()), "the output is not all finite"
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = {order[0], order[-1], 0, len(lengths) - 1, *order[: CHECKED - 2]}
    return max(error(out[i], attended(q, one, layer, i, i, lengths[i] - 1, scale)) for i in chosen)
