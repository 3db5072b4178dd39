"""What others' code takes for the same work. Each builder returns calls for `timing.measure`.

Built on demand and allowed to fail: FlashInfer is used when it can be imported, FlexAttention's paged form is
experimental in torch, torch.compile needs a compiler. Dense peers read keys and values that lie in order, which is
easier than what ours do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deploy.bench.cuda.paged import Heads, Paged
from deploy.bench.cuda.rows import Call

WORKSPACE_BYTES = 512 * 2**20  # FlashInfer's own
FLEX_BLOCK = 128  # tokens; FlexAttention's masks know no smaller block


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def sdpa_decode(batch: int, length: int, heads: Heads, count: int) -> Sequence[Call]:
    q = _random(batch, heads.queries, 1, heads.dim)

    def call() -> Call:
        k, v = (_random(batch, heads.keys, length, heads.dim) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return [call() for _ in range(count)]


def sdpa_prefill(queries: int, context: int, heads: Heads, backend: str) -> Sequence[Call]:
    """Keys are repeated for every query head beforehand: torch's causal_lower_right knows no grouped heads."""
    from torch.nn.attention.bias import causal_lower_right

    q = _random(1, heads.queries, queries, heads.dim)
    k, v = (_random(1, heads.queries, context + queries, heads.dim) for _ in range(2))
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def call() -> object:
        with sdpa_kernel(chosen):
            if not context:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(queries, context + queries))

    return [call]


def flashinfer_decode(q: Tensor, one: Paged, lengths: Sequence[int], heads: Heads) -> Sequence[Call]:
    import flashinfer

    block_size = one.cache.shape[4]
    counts = [-(-length // block_size) for length in lengths]
    indices = torch.cat([table[:count] for table, count in zip(one.step.block_tables, counts, strict=True)])
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    last = torch.tensor([(length - 1) % block_size + 1 for length in lengths], dtype=torch.int32)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        *(starts.cuda(), indices, last.cuda(), heads.queries, heads.keys, heads.dim, block_size),
        q_data_type=q.dtype,
        kv_data_type=one.cache.dtype,
    )

    def call(layer: int) -> Call:
        kv = tuple(one.cache[:, :, layer, kind].contiguous() for kind in (0, 1))
        return lambda: wrapper.run(q, kv)

    return [call(layer) for layer in range(one.cache.shape[2])]


def flex_decode(batch: int, length: int, heads: Heads) -> Sequence[Call]:
    """Sequences of one length, which needs no mask within a block."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    blocks = batch * -(-length // FLEX_BLOCK)
    table: Any = PagedAttention(blocks, FLEX_BLOCK, batch, device="cuda")
    for sequence in range(batch):
        table.reserve(torch.tensor(sequence, device="cuda"), torch.tensor(length, device="cuda"))
    logical = create_block_mask(noop_mask, batch, None, 1, length, device="cuda", BLOCK_SIZE=(1, FLEX_BLOCK))
    physical = table.convert_logical_block_mask(logical)
    q = _random(batch, heads.queries, 1, heads.dim)
    k, v = (_random(1, heads.keys, blocks * FLEX_BLOCK, heads.dim) for _ in range(2))
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return [lambda: compiled(q, k, v, block_mask=physical, enable_gqa=True)]


def compiled(function: Callable[..., object], inputs: Sequence[tuple[Tensor, ...]]) -> Sequence[Call]:
    """torch.compile of `function`."""
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)
    return [lambda arguments=arguments: fast(*arguments) for arguments in inputs]  # type: ignore[misc]
