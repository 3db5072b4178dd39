"""Sampling rows by seed and position, filters without a sort, as three Triton kernels.

Contract   `kernels.sampling.sample_rows`, its hash word for word. `floor_kernel` finds what a logit must reach to
           survive min-p, top-k and top-p; `draw_kernel` takes the best of logit + noise in each run of the vocabulary,
           and `best_kernel` the best of those, the first among equals. Runs have a fixed length, so that a row's token
           never depends on its batch. A row of NaN gives some token of the vocabulary.
Floors     A floor is the largest threshold at which enough is left: count (top-k) or probability (top-p) of the logits
           that reach it, both of which only fall as it rises. So it is searched among all numbers of the logits' dtype
           in their order, three thresholds per pass over the row: 8 passes for bf16, 16 for fp32, and equal logits
           live or die together by themselves. Counts are exact, probabilities are added in fp64 at the end.
Layout     logits [R, V], rows with any stride. A floor is one program per row; a row without filters returns at once.
Floor      Without filters, V logits read per row: 2 R V bytes in bf16; about 30 integer and float operations per logit,
           two logarithms among them. A filter reads the row 8 to 16 times more, from L2, at the speed of one SM.
Source     Gumbel-max: arXiv:1611.01144. Pivots instead of a sort: arXiv:2602.01518, and FlashInfer's sampling kernels.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import GREEDY_TEMPERATURE, MULTIPLIER, UNIFORM_BITS

LAUNCH = {
    "floor": {"block": 4096, "num_warps": 16},  # logits per turn of a row's program
    "draw": {"block": 4096, "num_warps": 8},  # logits per program
}

# low bits of a logit's fp32 form that are zero in each dtype, and need not be searched
SPARE_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

_GREEDY = tl.constexpr(GREEDY_TEMPERATURE)
_MULTIPLIER = tl.constexpr(MULTIPLIER)
_SHIFT = tl.constexpr(32 - UNIFORM_BITS)
_STEP = tl.constexpr(2.0**-UNIFORM_BITS)
_SIGN = tl.constexpr(2**31)
_LOWEST = tl.constexpr(0x007FFFFF)  # the rank of -inf


@triton.jit
def rank_of(x):
    """fp32 scalar -> int64, in the same order."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= _SIGN, 0xFFFFFFFF - bits, bits + _SIGN)


@triton.jit
def value_of(rank):
    """The reverse of `rank_of`."""
    bits = tl.where(rank >= _SIGN, rank - _SIGN, 0xFFFFFFFF - rank)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def scaled(x, temperature):
    """fp32 x / temperature as IEEE has it: where two logits are equal, or reach a floor, must not depend on the GPU."""
    return tl.div_rn(x, temperature)


@triton.jit
def above(row, vocab, temperature, peak, first, second, third, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the row's scaled logits reach each of three thresholds, or their probability in multiples of the
    peak's: fp64."""
    one = tl.zeros((BLOCK,), tl.float32)
    two = tl.zeros((BLOCK,), tl.float32)
    three = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = scaled(tl.load(row + token, token < vocab, float("-inf")).to(tl.float32), temperature)
        share = tl.where(token < vocab, 1.0, 0.0)
        if SHARES:
            share = tl.exp(x - peak)
        one += tl.where(x >= first, share, 0.0)
        two += tl.where(x >= second, share, 0.0)
        three += tl.where(x >= third, share, 0.0)
    return tl.sum(one.to(tl.float64), 0), tl.sum(two.to(tl.float64), 0), tl.sum(three.to(tl.float64), 0)


@triton.jit
def highest(row, vocab, temperature, top, peak, target, SHARES: tl.constexpr, SPARE: tl.constexpr, BLOCK: tl.constexpr):
    """The highest threshold at which what is `above` is at least the target: a scaled logit. `top` is the largest
    logit; ranks are counted in steps of the dtype's numbers, and a negative number's spare bits are ones."""
    low = tl.full((), _LOWEST >> SPARE, tl.int64)  # reached by the target always
    high = (rank_of(top) >> SPARE) + 1  # never
    while high - low > 1:
        step = (high - low + 3) // 4
        spare = (1 << SPARE) - 1
        one = low + step
        two = tl.minimum(one + step, high)
        three = tl.minimum(two + step, high)
        a, b, c = above(
            row,
            vocab,
            temperature,
            peak,
            scaled(value_of((one << SPARE) + tl.where(one < (_SIGN >> SPARE), spare, 0)), temperature),
            scaled(value_of((two << SPARE) + tl.where(two < (_SIGN >> SPARE), spare, 0)), temperature),
            scaled(value_of((three << SPARE) + tl.where(three < (_SIGN >> SPARE), spare, 0)), temperature),
            SHARES,
            BLOCK,
        )
        reaches_one = a >= target
        reaches_two = (b >= target) & (two < high)
        reaches_three = (c >= target) & (three < high)
        new_low = tl.where(reaches_three, three, tl.where(reaches_two, two, tl.where(reaches_one, one, low)))
        high = tl.where(reaches_three, high, tl.where(reaches_two, three, tl.where(reaches_one, two, one)))
        low = new_low
    return scaled(value_of((low << SPARE) + tl.where(low < (_SIGN >> SPARE), (1 << SPARE) - 1, 0)), temperature)


@triton.jit
def floor_kernel(
    logits,
    row_stride,
    vocab,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    floors,  # [R] fp32
    SPARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    temperature = tl.load(temperatures + index).to(tl.float32)
    top_k = tl.load(top_ks + index)
    top_p = tl.load(top_ps + index).to(tl.float64)
    min_p = tl.load(min_ps + index).to(tl.float64)
    floor = tl.full((), float("-inf"), tl.float32)
    filtered = ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0)
    if filtered & (temperature >= _GREEDY) & (top_k != 1):
        row = logits + index.to(tl.int64) * row_stride
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(row + token, token < vocab, float("-inf")).to(tl.float32))
        top = tl.max(best, 0)
        peak = scaled(top, temperature)
        if min_p > 0.0:
            floor = (peak.to(tl.float64) + tl.log(min_p)).to(tl.float32)
        if (top_k > 0) & (top_k < vocab):
            kth = highest(row, vocab, temperature, top, peak, top_k.to(tl.float64), False, SPARE, BLOCK)
            floor = tl.maximum(floor, kth)
        if top_p < 1.0:
            mass, _, _ = above(row, vocab, temperature, peak, floor, floor, floor, True, BLOCK)
            nucleus = highest(row, vocab, temperature, top, peak, top_p * mass, True, SPARE, BLOCK)
            floor = tl.maximum(floor, nucleus)
    tl.store(floors + index, floor)


@triton.jit
def gumbel(token, first, second):
    """`kernels.sampling._noise`: int32 token ids, uint32 words -> fp32."""
    x = token.to(tl.uint32) ^ first
    x = (x ^ (x >> 16)) * _MULTIPLIER
    x = x ^ second
    x = (x ^ (x >> 16)) * _MULTIPLIER
    x = x ^ (x >> 16)
    uniform = ((x >> _SHIFT).to(tl.float32) + 0.5) * _STEP
    return -tl.log(-tl.log(uniform))


@triton.jit
def draw_kernel(
    logits,
    row_stride,
    vocab,
    temperatures,
    top_ks,
    floors,
    words,  # [R, 2]
    scores,  # [R, runs] fp32
    tokens,  # [R, runs] int32
    BLOCK: tl.constexpr,
):
    index, run = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + index).to(tl.float32)
    token = run * BLOCK + tl.arange(0, BLOCK)
    row = logits + index.to(tl.int64) * row_stride
    score = tl.load(row + token, token < vocab, float("-inf")).to(tl.float32)
    if (temperature >= _GREEDY) & (tl.load(top_ks + index) != 1):
        score = scaled(score, temperature)
        noise = gumbel(token, tl.load(words + 2 * index).to(tl.uint32), tl.load(words + 2 * index + 1).to(tl.uint32))
        score = tl.where(score >= tl.load(floors + index), score + noise, float("-inf"))
    best = tl.max(score, 0)
    at = index * tl.num_programs(1) + run
    tl.store(scores + at, best)
    tl.store(tokens + at, tl.min(tl.where(score == best, token, vocab - 1), 0))


@triton.jit
def best_kernel(scores, tokens, chosen, runs, vocab, RUNS: tl.constexpr):
    index = tl.program_id(0)
    at = tl.arange(0, RUNS)
    score = tl.load(scores + index * runs + at, at < runs, float("-inf"))
    token = tl.load(tokens + index * runs + at, at < runs, vocab - 1)
    first = tl.min(tl.where(score == tl.max(score, 0), token, vocab - 1), 0)
    tl.store(chosen + index, first.to(tl.int64))


def sample_rows(
    logits: Tensor,  # [R, V]
    temperature: Tensor,  # [R]
    top_k: Tensor,  # [R]
    top_p: Tensor,  # [R]
    min_p: Tensor,  # [R]
    words: Tensor,  # [R, 2]
) -> Tensor:  # [R] int64
    rows, vocab = logits.shape
    draw, floor = LAUNCH["draw"], LAUNCH["floor"]
    runs = triton.cdiv(vocab, draw["block"])
    chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return chosen
    floors = torch.empty(rows, dtype=torch.float32, device=logits.device)
    scores = torch.empty(rows, runs, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, runs, dtype=torch.int32, device=logits.device)
    floor_kernel[(rows,)](
        logits, logits.stride(0), vocab, temperature, top_k, top_p, min_p, floors,
        SPARE=SPARE_BITS[logits.dtype], BLOCK=floor["block"], num_warps=floor["num_warps"],
    )  # fmt: skip
    draw_kernel[(rows, runs)](
        logits, logits.stride(0), vocab, temperature, top_k, floors, words, scores, tokens,
        BLOCK=draw["block"], num_warps=draw["num_warps"],
    )  # fmt: skip
    best_kernel[(rows,)](scores, tokens, chosen, runs, vocab, RUNS=triton.next_power_of_2(runs), num_warps=1)
    return chosen
