"""Sampling rows by seed and position, filters without a sort, as three Triton kernels.

Contract   `kernels.sampling.sample_rows`, its hash word for word. `floor_kernel` finds what a logit must reach to
           survive min-p, top-k and top-p; `draw_kernel` takes the best of logit + noise in each run of the vocabulary,
           and `best_kernel` the best of those, the first among equals. Runs have a fixed length, so that a row's token
           never depends on its batch. A row of NaN gives some token of the vocabulary.
Floors     A floor is the largest threshold at which enough is left: count (top-k) or probability (top-p) of the logits
           that reach it, both of which only fall as it rises. So it is searched among all numbers of the logits' dtype
           in their order, four thresholds per pass over the row: 7 passes for bf16, 14 for fp32, and equal logits
           live or die together by themselves. Counts are exact, probabilities are added in fp64 at the end. Only
           logits that the temperature makes equal could be told apart, and division keeps their order: the floor is
           what the CPU finds. Divisions are IEEE's wherever logits are compared with a floor.
Layout     logits [R, V], rows with any stride. A floor is one program per row; a row without filters returns at once.
Floor      Without filters, V logits read per row: 2 R V bytes in bf16; with noise about 100 instructions per logit,
           most of them two accurate logarithms and a division. A filter reads the row 7 to 14 times more, from L2, at
           the speed of one SM.
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
    "floor": {"block": 4096, "ways": 4, "num_warps": 16},  # logits per turn of a row's program; thresholds per pass
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
def highest(
    row,
    vocab,
    colder,  # 1 / temperature
    top,  # the largest logit
    target,
    SHARES: tl.constexpr,
    SPARE: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest number that as much as `target` of the logits reaches: of their count, or of their probability in
    multiples of the peak's. The rank of an fp32 number is its bits, turned so that they ascend with it, without the
    spare ones, which are all ones in negative numbers."""
    bits = top.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    low = tl.zeros_like(bits) + (_LOWEST >> SPARE)  # that much reaches -inf, whatever the target
    high = (tl.where(bits >= _SIGN, 0xFFFFFFFF - bits, bits + _SIGN) >> SPARE) + 1  # and nothing is above the peak
    found = tl.zeros_like(top) + float("-inf")
    while high - low > 1:
        rank = tl.minimum(low + (high - low + WAYS) // (WAYS + 1) * (tl.arange(0, WAYS) + 1), high)
        turned = (rank << SPARE) + tl.where(rank < (_SIGN >> SPARE), (1 << SPARE) - 1, 0)
        turned = tl.where(turned >= _SIGN, turned - _SIGN, 0xFFFFFFFF - turned)
        threshold = turned.to(tl.uint32).to(tl.float32, bitcast=True)
        reached = tl.zeros((BLOCK, WAYS), tl.float32)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, token < vocab, float("-inf")).to(tl.float32)
            share = tl.exp((x - top) * colder) if SHARES else tl.full((BLOCK,), 1.0, tl.float32)
            reached += tl.where(x[:, None] >= threshold[None, :], share[:, None], 0.0)
        enough = (tl.sum(reached.to(tl.float64), 0) >= target) & (rank < high)
        found = tl.maximum(found, tl.max(tl.where(enough, threshold, float("-inf")), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, rank, low), 0))
        high = tl.min(tl.where(enough, high, rank), 0)
    return found


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
    WAYS: tl.constexpr,
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
        colder = 1.0 / temperature
        if min_p > 0.0:
            floor = (tl.div_rn(top, temperature).to(tl.float64) + tl.log(min_p)).to(tl.float32)
        if (top_k > 0) & (top_k < vocab):
            kth = highest(row, vocab, colder, top, top_k.to(tl.float64), False, SPARE, WAYS, BLOCK)
            floor = tl.maximum(floor, tl.div_rn(kth, temperature))
        if top_p < 1.0:
            left = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, vocab, BLOCK):
                token = start + tl.arange(0, BLOCK)
                x = tl.load(row + token, token < vocab, float("-inf")).to(tl.float32)
                left += tl.where(tl.div_rn(x, temperature) >= floor, tl.exp((x - top) * colder), 0.0)
            target = top_p * tl.sum(left.to(tl.float64), 0)
            last = highest(row, vocab, colder, top, target, True, SPARE, WAYS, BLOCK)
            floor = tl.maximum(floor, tl.div_rn(last, temperature))
    tl.store(floors + index, floor)


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
        score = tl.div_rn(score, temperature)
        x = token.to(tl.uint32) ^ tl.load(words + 2 * index).to(tl.uint32)  # the hash of kernels.sampling
        x = (x ^ (x >> 16)) * _MULTIPLIER
        x = x ^ tl.load(words + 2 * index + 1).to(tl.uint32)
        x = (x ^ (x >> 16)) * _MULTIPLIER
        x = x ^ (x >> 16)
        uniform = ((x >> _SHIFT).to(tl.float32) + 0.5) * _STEP
        noise = -tl.log(-tl.log(uniform))
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
        SPARE=SPARE_BITS[logits.dtype], WAYS=floor["ways"], BLOCK=floor["block"], num_warps=floor["num_warps"],
    )  # fmt: skip
    draw_kernel[(rows, runs)](
        logits, logits.stride(0), vocab, temperature, top_k, floors, words, scores, tokens,
        BLOCK=draw["block"], num_warps=draw["num_warps"],
    )  # fmt: skip
    best_kernel[(rows,)](scores, tokens, chosen, runs, vocab, RUNS=triton.next_power_of_2(runs), num_warps=1)
    return chosen
