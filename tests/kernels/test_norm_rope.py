"""What is fused on a GPU is, on the CPU, exactly the operations that it stands for."""

import pytest
import torch

from kernels.attention import token_rows, write_kv_inplace
from kernels.norm_rope import add_rms_norm_inplace, rms_norm, rope_inplace, rope_write_inplace
from kernels.quantization import dequantize

HEADS, KV_HEADS, D, BLOCKS, LAYERS, SIZE = 4, 2, 8, 3, 2, 4
SLOTS = torch.tensor([5, -1, 8], dtype=torch.int32)
POSITIONS = torch.tensor([1, 0, 9], dtype=torch.int32)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_the_residual_and_its_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, x, weight = torch.randn(3, 36).to(dtype), torch.randn(3, 36).to(dtype), torch.randn(36).to(dtype)
    added = hidden + x
    assert torch.equal(add_rms_norm_inplace(hidden, x, weight, 1e-5), rms_norm(added, weight, 1e-5))
    assert torch.equal(hidden, added)


def test_gemma_multiplies_by_one_more_than_the_weight() -> None:
    x, weight = torch.randn(3, 36), torch.randn(36)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, gemma=True), rms_norm(x, 1 + weight, 1e-5))


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_write(dtype: torch.dtype, normed: bool) -> None:
    torch.manual_seed(0)
    qkv, table = torch.randn(3, HEADS + 2 * KV_HEADS, D).to(dtype), torch.randn(10, 2, D).to(dtype)
    norm = torch.randn(HEADS + KV_HEADS, D).to(dtype) if normed else None
    expected, filled = qkv.clone(), torch.zeros(BLOCKS, KV_HEADS, LAYERS, 2, SIZE, D, dtype=dtype)
    qk = expected[:, : HEADS + KV_HEADS]
    if norm is not None:
        qk.copy_(rms_norm(qk, norm, 1e-5))
    rope_inplace(qk, *table[POSITIONS.long()].unbind(1))
    rows = [
        (slot // SIZE * KV_HEADS + head) * LAYERS * 2 * SIZE + kind * SIZE + slot % SIZE
        for slot in (5, 8)
        for kind in (0, 1)
        for head in range(KV_HEADS)
    ]
    write_kv_inplace(token_rows(filled)[1], torch.tensor(rows), expected[[0, 2], HEADS:])
    cache = torch.zeros_like(filled)
    rope_write_inplace(qkv, table, POSITIONS, cache, 1, SLOTS, HEADS, KV_HEADS, norm, 1e-5)
    assert torch.equal(qkv, expected)
    assert torch.equal(cache, filled)


@pytest.mark.parametrize(("stored", "error"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.07)], ids=str)
def test_a_quantized_cache_holds_nearly_the_same(stored: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    qkv, table = torch.randn(3, HEADS + 2 * KV_HEADS, D), torch.randn(10, 2, D)
    shape = (BLOCKS, KV_HEADS, LAYERS, 2, SIZE, D)
    exact, cache, scales = torch.zeros(shape), torch.zeros(shape).to(stored), torch.zeros(shape[:-1])
    again = qkv.clone()
    rope_write_inplace(qkv, table, POSITIONS, exact, 0, SLOTS, HEADS, KV_HEADS, None, 1e-5)
    rope_write_inplace(again, table, POSITIONS, cache, 0, SLOTS, HEADS, KV_HEADS, None, 1e-5, scales)
    apart = (dequantize(cache, scales, torch.float32) - exact).abs()
    assert (apart <= error * exact.abs().amax(-1, keepdim=True)).all()
    assert int(scales.count_nonzero()) == 2 * 2 * KV_HEADS


def test_scales_and_the_caches_type_belong_together() -> None:
    qkv, table = torch.randn(3, HEADS + 2 * KV_HEADS, D), torch.randn(10, 2, D)
    cache = torch.zeros(BLOCKS, KV_HEADS, LAYERS, 2, SIZE, D, dtype=torch.int8)
    with pytest.raises(ValueError, match="scales"):
        rope_write_inplace(qkv, table, POSITIONS, cache, 0, SLOTS, HEADS, KV_HEADS, None, 1e-5)
