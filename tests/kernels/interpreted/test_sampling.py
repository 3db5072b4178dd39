"""The kernels choose the very tokens that the CPU's sampler chooses, whatever filters a row asks for."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.messages import Sampling
from kernels.sampling import key, sample_rows
from workers.draw import Draw
from workers.sampling import sample

FILTERS: list[dict[str, Any]] = [
    {}, {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 1.7}, {"top_k": 1}, {"top_k": 2}, {"top_k": 40},
    {"top_k": 10**6}, {"top_p": 0.5}, {"top_p": 0.95}, {"top_p": 1e-6}, {"min_p": 0.1}, {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.7}, {"min_p": 0.02, "top_p": 0.9}, {"min_p": 0.05, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 1.4, "min_p": 0.01, "top_k": 300},
]  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def by_kernel(logits: Tensor, draws: list[Draw], precision: torch.dtype = torch.float64) -> list[int]:
    s = [draw.sampling for draw in draws]
    words = torch.tensor([key(draw.sampling.seed, len(draw.tokens)) for draw in draws])
    tokens = sample_rows(
        logits,
        torch.tensor([each.temperature for each in s], dtype=precision),
        torch.tensor([each.top_k for each in s], dtype=torch.int32),
        torch.tensor([each.top_p for each in s], dtype=precision),
        torch.tensor([each.min_p for each in s], dtype=precision),
        words,
    )
    assert tokens.dtype is torch.int64
    found: list[int] = tokens.tolist()
    return found


def some(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Rows of a larger tensor: their stride is not the vocabulary."""
    whole = torch.full((rows, vocab + 7), 1e30).to(dtype)
    whole[:, :vocab] = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return whole[:, :vocab]


@DTYPES
@pytest.mark.parametrize(("vocab", "rows"), [(50, 36), (5000, 18)])
def test_the_same_tokens_as_the_cpu(dtype: torch.dtype, vocab: int, rows: int) -> None:
    """bf16 logits of a vocabulary have many equals; a filter's boundary runs through them."""
    logits = some(rows, vocab, dtype)
    draws = [Draw(Sampling(seed=i, **FILTERS[i % len(FILTERS)]), [0] * (i + 1), i + 1) for i in range(len(logits))]
    assert by_kernel(logits, draws) == sample(logits, draws)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.8}, {"top_k": 9, "top_p": 0.5}], ids=str)
def test_the_boundary_itself(filters: dict[str, Any]) -> None:
    """Flat logits: every survivor is drawn, and the first that does not survive never is."""
    logits = (some(1, 50, torch.float32, seed=5) / 8).bfloat16().expand(40, -1)
    draws = [Draw(Sampling(seed=seed, **filters), [0], 1) for seed in range(40)]
    found = by_kernel(logits, draws)
    assert found == sample(logits, draws)
    assert len(set(found)) >= 3


@DTYPES
def test_equal_logits_live_or_die_together(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, -0.0, 0.0]).to(dtype)[None].expand(20, -1)
    draws = [Draw(Sampling(seed=seed, top_k=2), [0], 1) for seed in range(20)]
    assert set(by_kernel(logits, draws)) == {1, 2, 3}
    zeros = torch.zeros(20, 4).to(dtype)
    zeros[:, ::2] = -0.0
    assert set(by_kernel(zeros, draws)) == set(range(4))


def test_the_first_of_the_largest_is_greedy_and_masked_logits_are_not_drawn() -> None:
    logits = torch.full((4, 9000), -math.inf)
    logits[:, [7, 4999, 8999]] = 2.0
    greedy = [Draw(Sampling(seed=1, temperature=0.0), [0], 1), Draw(Sampling(seed=1, top_k=1), [0], 1)]
    drawn = [Draw(Sampling(seed=seed, top_p=0.99), [0], 1) for seed in (3, 4)]
    found = by_kernel(logits, greedy + drawn)
    assert found[:2] == [7, 7]
    assert set(found[2:]) <= {7, 4999, 8999}
    assert found == sample(logits, greedy + drawn)


def test_draws_follow_the_softmax() -> None:
    rows = 700
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    draws = [Draw(Sampling(seed=seed, temperature=0.7), [0], 1) for seed in range(rows)]
    counts = torch.bincount(torch.tensor(by_kernel(logits.expand(rows, -1), draws)), minlength=12)
    expected = torch.softmax(logits / 0.7, -1).double() * rows
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 38  # 11 degrees of freedom: exceeded once in 12,000


def test_a_row_does_not_depend_on_its_batch_and_words_may_have_32_bits() -> None:
    logits = some(len(FILTERS), 5000, torch.bfloat16)
    draws = [Draw(Sampling(seed=-i, **filters), [0] * 9, 9) for i, filters in enumerate(FILTERS)]
    together = by_kernel(logits, draws, torch.float32)
    assert together == [by_kernel(logits[i : i + 1], draws[i : i + 1], torch.float32)[0] for i in range(len(draws))]
    words = torch.tensor([key(-i, 9) for i in range(len(FILTERS))])
    ones = torch.ones(len(FILTERS))
    settings = (ones, ones.int() * 0, ones, ones * 0)
    assert torch.equal(sample_rows(logits, *settings, words), sample_rows(logits, *settings, words.to(torch.int32)))


def test_a_row_of_nan_gives_a_token_of_the_vocabulary() -> None:
    draws = [Draw(Sampling(seed=1, **filters), [0], 1) for filters in FILTERS]
    found = by_kernel(torch.full((len(FILTERS), 100), math.nan), draws)
    assert all(0 <= token < 100 for token in found)


@DTYPES
def test_the_statement_for_the_cpu_is_the_workers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.sampling.uses_triton", lambda x: False)
    logits = some(2 * len(FILTERS), 2000, dtype)
    draws = [Draw(Sampling(seed=i, **FILTERS[i % len(FILTERS)]), [0] * (i + 1), i + 1) for i in range(len(logits))]
    assert by_kernel(logits, draws) == sample(logits, draws)


def test_no_rows() -> None:
    empty = torch.empty(0)
    none = sample_rows(torch.empty(0, 9), empty, empty.int(), empty, empty, torch.empty(0, 2, dtype=torch.int64))
    assert none.shape == (0,)
