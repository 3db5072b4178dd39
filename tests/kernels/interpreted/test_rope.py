"""Norm, rotation and cache write of a fused projection against fp64; what is not written must stay as it was."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.norm_rope import rope_write_inplace
from kernels.quantization import quantize
from tests.kernels.interpreted.rounding import DTYPES, close

BLOCKS, LAYERS, LAYER, SIZE = 5, 3, 1, 16
POSITIONS = 40
# query heads, KV heads, D: SmolLM2's, a head dimension of no power of two, more heads than one program takes
SHAPES = pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 2, 80), (24, 4, 128), (1, 1, 256)])
# blocks in no order, two in one block, the block's ends, and two rows that write nothing
SLOTS = torch.tensor([3 * SIZE + 15, -1, 0, 3 * SIZE + 14, 4 * SIZE, -1, SIZE + 7], dtype=torch.int32)
PLACES = torch.tensor([0, 39, 7, 1, 31, 5, 12], dtype=torch.int32)


class Case:
    """Random inputs and what must come of them."""

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, normed: bool) -> None:
        torch.manual_seed(dim)
        self.heads, self.kv_heads = heads, kv_heads
        whole = torch.full((len(SLOTS), heads + 2 * kv_heads + 1, dim), torch.nan, dtype=dtype)
        whole[:, :-1] = torch.randn(len(SLOTS), heads + 2 * kv_heads, dim)
        self.qkv = whole[:, :-1]
        self.v = self.qkv[:, heads + kv_heads :].clone()
        angles = torch.rand(POSITIONS, dim // 2) * 6.3
        cos, sin = angles.cos(), angles.sin()
        self.table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(dtype)
        self.norm = torch.randn(heads + kv_heads, dim).to(dtype) if normed else None

    def rotated(self) -> tuple[Tensor, Tensor]:
        """q and k [T, Hq + Hkv, D] in fp64, and for each value the largest magnitude that it is a sum of."""
        x = self.qkv[:, : self.heads + self.kv_heads].double()
        if self.norm is not None:
            dtype = self.qkv.dtype
            ones = torch.ones(x.shape[-1])
            x = (reference.rms_norm(x, ones, 1e-6).to(dtype).double() * self.norm.double()).to(dtype).double()
        cos, sin = self.table.double()[PLACES.long()].unbind(1)
        other = x.roll(x.shape[-1] // 2, -1)
        first, second = x * cos[:, None], other * sin[:, None]
        return first + second, torch.maximum(x.abs(), other.abs())

    def run(self, cache: Tensor, scales: Tensor | None = None) -> None:
        rope_write_inplace(
            self.qkv, self.table, PLACES, cache, LAYER, SLOTS, self.heads, self.kv_heads, self.norm, 1e-6, scales
        )

    def cache(self, dtype: torch.dtype) -> Tensor:
        shape = (BLOCKS, self.kv_heads, LAYERS, 2, SIZE, self.qkv.shape[-1])
        return torch.full(shape, 77.0).to(dtype)

    def written(self) -> Tensor:
        """[N, 2, Hkv, D] of the rows with a slot: what the cache must hold, from the q and k that are in qkv now."""
        kv = self.qkv[SLOTS >= 0][:, self.heads :]
        return kv.view(len(kv), 2, self.kv_heads, -1)


def rows_of(cache: Tensor) -> Tensor:
    """[N, 2, Hkv, ...] of the slots, which are taken out of the cache: what stays must not have been touched."""
    slots = SLOTS[SLOTS >= 0]
    found = torch.stack([cache[slot // SIZE, :, LAYER, :, slot % SIZE].transpose(0, 1) for slot in slots])
    for slot in slots:
        cache[slot // SIZE, :, LAYER, :, slot % SIZE] = 77.0
    return found


@DTYPES
@SHAPES
@pytest.mark.parametrize("normed", [False, True])
def test_rotated_in_place_and_written(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, normed: bool) -> None:
    case = Case(heads, kv_heads, dim, dtype, normed)
    expected, magnitude = case.rotated()
    cache = case.cache(dtype)
    case.run(cache)
    # the norm's own rounding may fall on either side, and the rotation carries that on
    found = case.qkv[:, : heads + kv_heads]
    assert close(found, expected, 4 if normed else 1, magnitude if normed or dtype is torch.float32 else None)
    assert torch.equal(case.qkv[:, heads + kv_heads :], case.v)
    assert torch.equal(rows_of(cache), case.written())
    assert (cache == 77.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@SHAPES
def test_quantized_as_the_format_says(
    dtype: torch.dtype, stored: torch.dtype, heads: int, kv_heads: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(heads, kv_heads, dim, dtype, normed=True)
    cache, scales = case.cache(torch.float32).to(stored), torch.full((BLOCKS, kv_heads, LAYERS, 2, SIZE), 77.0)
    untouched = cache.view(torch.uint8)[0, 0, 0, 0, 0, 0].clone()
    case.run(cache, scales)
    monkeypatch.setattr("kernels.quantization.uses_triton", lambda x: False)
    levels, expected = quantize(case.written(), stored)
    raw = cache.view(torch.uint8)
    slots = SLOTS[SLOTS >= 0]
    found = torch.stack([raw[slot // SIZE, :, LAYER, :, slot % SIZE].transpose(0, 1) for slot in slots])
    assert torch.equal(found, levels.view(torch.uint8))
    for slot in slots:
        raw[slot // SIZE, :, LAYER, :, slot % SIZE] = untouched
    assert (raw == untouched).all()
    assert torch.equal(rows_of(scales), expected)
    assert (scales == 77.0).all()


@DTYPES
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_as_the_cpu_does_it(dtype: torch.dtype, stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the values' dtype apart at most, or one level: the CPU rounds in between."""
    found, expected = Case(9, 3, 64, dtype, True), Case(9, 3, 64, dtype, True)
    caches = [found.cache(torch.float32).to(stored or dtype) for _ in range(2)]
    scales = [torch.zeros(BLOCKS, 3, LAYERS, 2, SIZE) if stored else None for _ in range(2)]
    found.run(caches[0], scales[0])
    for module in ("norm_rope", "quantization"):
        monkeypatch.setattr(f"kernels.{module}.uses_triton", lambda x: False)
    expected.run(caches[1], scales[1])
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.qkv, expected.qkv, rtol=tolerance, atol=tolerance)
    filled = [
        cache.float() if scale is None else cache.float() * scale[..., None]
        for cache, scale in zip(caches, scales, strict=True)
    ]
    apart = {None: 0.0, torch.int8: 0.04, torch.float8_e4m3fn: 0.3}[stored]  # a level of values up to 4
    torch.testing.assert_close(filled[0], filled[1], rtol=tolerance, atol=tolerance + apart)


def test_a_cache_that_needs_scales_is_not_written_without() -> None:
    case = Case(2, 1, 64, torch.float32, False)
    with pytest.raises(ValueError, match="scales"):
        case.run(case.cache(torch.int8))
