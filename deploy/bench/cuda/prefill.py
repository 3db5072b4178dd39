"""Rows of paged prefill attention: a chunk of queries against everything before it, bound by the tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deploy.bench.cuda import peers
from deploy.bench.cuda.paged import Heads, Paged, attended, paged
from deploy.bench.cuda.rows import Call, Case, Row, error, sets
from kernels.paged_attention import attend

HEADS = Heads(32, 8, 128)
QUERIES, CONTEXTS = (512, 2048, 8192), (0, 8192, 32_768)
BLOCK_SIZE = 16
GATE, GATED_QUERIES = 0.42, 2048
VERIFY = (64, 5, 4096)  # sequences, queries and keys of each: a draft being verified; bound by bandwidth
CHECKED = 8  # queries


def rows() -> list[Row]:
    found = [_row(f"{q} after {c}", [q], [c], GATE if q == GATED_QUERIES else None) for q in QUERIES for c in CONTEXTS]
    random = np.random.default_rng(2)
    queries, contexts = (random.integers(low, high, 16).tolist() for low, high in ((37, 2048), (0, 8192)))
    found.append(_row("16 x 37 to 2k after 0 to 8k", queries, contexts, None))
    sequences, each, keys = VERIFY
    found.append(_row(f"{sequences} x {each} after {keys - each}", [each] * sequences, [keys - each] * sequences, None))
    return found


def flop(queries: Sequence[int], contexts: Sequence[int], heads: Heads) -> float:
    """The causal half only."""
    pairs = sum(q * c + q * (q + 1) / 2 for q, c in zip(queries, contexts, strict=True))
    return 4.0 * heads.queries * heads.dim * pairs


def _row(name: str, queries: list[int], contexts: list[int], gate: float | None) -> Row:
    tokens, keys = sum(queries), sum(queries) + sum(contexts)
    return Row(
        kernel="prefill",
        shape=f"{name}, {HEADS}, blocks of {BLOCK_SIZE}",
        moved=4.0 * tokens * HEADS.queries * HEADS.dim + 4.0 * keys * HEADS.keys * HEADS.dim,
        flop=flop(queries, contexts, HEADS),
        build=functools.partial(_build, queries, contexts),
        gate=gate,
    )


def _build(queries: list[int], contexts: list[int]) -> Case:
    lengths = [q + c for q, c in zip(queries, contexts, strict=True)]
    layers = min(4, sets(4.0 * sum(lengths) * HEADS.keys * HEADS.dim))
    one = paged(lengths, queries, HEADS, BLOCK_SIZE, layers, torch.bfloat16)
    q = torch.randn(sum(queries), HEADS.queries, HEADS.dim, dtype=torch.bfloat16, device="cuda")
    scale = HEADS.dim**-0.5
    calls = [_call(q, one, layer, scale) for layer in range(layers)]
    named: dict[str, Callable[[], Sequence[Call]]] = {}
    if len(queries) == 1:
        named["SDPA, dense, FA2"] = functools.partial(peers.sdpa_prefill, queries[0], contexts[0], HEADS, "flash")
        if not contexts[0]:
            named["SDPA, dense, cuDNN"] = functools.partial(peers.sdpa_prefill, queries[0], 0, HEADS, "cudnn")
    return Case(calls, functools.partial(_check, q, one, queries, contexts, scale), 5e-3, named)


def _call(q: Tensor, one: Paged, layer: int, scale: float) -> Call:
    return lambda: attend(q, one.cache, layer, one.step, scale, 0)


def _check(q: Tensor, one: Paged, queries: list[int], contexts: list[int], scale: float) -> float:
    layer = one.cache.shape[2] - 1
    out = attend(q, one.cache, layer, one.step, scale, 0).view(q.shape)
    assert bool(out.isfinite().all()), "the output is not all finite"
    worst, first = 0.0, 0
    for sequence, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        for i in sorted({0, count - 1, *range(0, count, max(1, count // CHECKED))}):
            wanted = attended(q, one, layer, first + i, sequence, context + i, scale)
            worst = max(worst, error(out[first + i], wanted))
        first += count
    return worst
