"""Sampling against naive statements of each stage, and the promises of determinism that failover rests on."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import Sampling
from workers.draw import Draw, finish
from workers.sampling import sample

VOCAB = 50


def some_logits(seed: int = 0, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def draws(logits: torch.Tensor, count: int, prompt: tuple[int, ...] = (1, 2), **parameters: Any) -> list[int]:
    """Tokens drawn for `count` seeds."""
    rows = [Draw(Sampling(seed=seed, **parameters), prompt, len(prompt)) for seed in range(count)]
    return sample(logits.expand(count, -1), rows)


def one(logits: torch.Tensor, tokens: list[int], prompt_length: int, **parameters: Any) -> int:
    return sample(logits[None], [Draw(Sampling(**parameters), tokens, prompt_length)])[0]


# ------------------------------------------------------------------------------------------------- distribution
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = some_logits(3, vocab=12, spread=1.0)
    count = 6000
    expected = torch.softmax(logits / temperature, -1).double() * count
    found = torch.bincount(torch.tensor(draws(logits, count, temperature=temperature)), minlength=12)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 38  # 11 degrees of freedom: exceeded once in 12,000


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    logits = some_logits(4, vocab=300, spread=1.5)
    count = 4000
    keep = logits.topk(6).indices
    expected = torch.zeros(300, dtype=torch.float64)
    expected[keep] = torch.softmax(logits[keep], -1).double() * count
    found = torch.bincount(torch.tensor(draws(logits, count, top_k=6)), minlength=300)
    assert int(found[expected == 0].sum()) == 0
    chi_square = float(((found - expected) ** 2 / expected)[keep].sum())
    assert chi_square < 26  # 5 degrees of freedom


def test_successive_positions_of_one_seed_are_independent_draws() -> None:
    logits = torch.zeros(2)
    rows = [Draw(Sampling(seed=7), [0] * position, 1) for position in range(1, 4001)]
    drawn = np.array(sample(logits.expand(4000, -1), rows))
    assert abs(drawn.mean() - 0.5) < 0.04
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.08


# ------------------------------------------------------------------------------------------------------ filters
def allowed(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The filters with full sorts, in fp64: min-p, then top-k, then top-p of what is left."""
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    weight = {token: math.exp(float(logits[token]) - float(logits[order[0]])) for token in order}
    kept = [token for token in order if weight[token] >= min_p]
    kept = kept[:top_k] if top_k else kept
    total, reached, nucleus = sum(weight[token] for token in kept), 0.0, []
    for token in kept:
        if reached >= top_p * total:
            break
        nucleus.append(token)
        reached += weight[token]
    return set(nucleus)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 3}, {"top_k": 49}, {"top_k": 50}, {"top_k": 900}, {"top_p": 0.5}, {"top_p": 0.95}, {"top_p": 1e-6},
        {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 8, "top_p": 0.7}, {"min_p": 0.02, "top_p": 0.9},
        {"min_p": 0.05, "top_k": 5, "top_p": 0.8},
    ],
    ids=str,
)  # fmt: skip
def test_draws_cover_exactly_what_the_filters_leave(filters: dict[str, Any]) -> None:
    logits = some_logits(5) / 4  # flat enough for every survivor to be drawn
    assert set(draws(logits, 4000, **filters)) == allowed(logits, **filters)


@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.97}, {"top_k": 1500}, {"top_k": 1500, "top_p": 0.97}, {"min_p": 0.5, "top_p": 0.97}],
    ids=str,
)
def test_filters_that_a_thousand_candidates_do_not_decide(filters: dict[str, Any]) -> None:
    logits = some_logits(6, vocab=3000, spread=0.3)
    expected = allowed(logits, **filters)
    drawn = set(draws(logits, 3000, **filters))
    assert drawn <= expected
    assert len(drawn) > 0.6 * min(len(expected), 3000)  # of N equally likely tokens, N draws show 63 %
    lowest = min(expected, key=lambda token: float(logits[token]))
    lifted = logits.clone()  # the boundary itself: the least likely survivor can win, its successor cannot
    assert one(lifted, [1], 1, seed=_seed_for(lifted, lowest, filters), **filters) == lowest


def _seed_for(logits: torch.Tensor, token: int, filters: dict[str, Any]) -> int:
    """A seed whose noise makes `token` win, found by drawing without filters among all survivors."""
    survivors = torch.full_like(logits, -math.inf)
    keep = list(allowed(logits, **filters))
    survivors[keep] = logits[keep]
    for start in range(0, 200_000, 2000):
        rows = [Draw(Sampling(seed=seed), [1], 1) for seed in range(start, start + 2000)]
        found = sample(survivors.expand(2000, -1), rows)
        if token in found:
            return start + found.index(token)
    raise AssertionError("no seed draws the token; the noise is not random")


def test_equal_logits_live_or_die_together() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert set(draws(logits, 500, top_k=2)) == {1, 2, 3}


# ---------------------------------------------------------------------------------------------------- penalties
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=30),
    prompt=st.integers(1, 30),
    repetition=st.sampled_from([1.0, 0.8, 1.5]),
    frequency=st.sampled_from([0.0, 0.7, -0.4]),
    presence=st.sampled_from([0.0, 1.1, -0.3]),
    bias=st.dictionaries(st.integers(0, VOCAB + 5), st.floats(-5, 5), max_size=3),
)
def test_penalties_equal_a_naive_statement(
    tokens: list[int], prompt: int, repetition: float, frequency: float, presence: float, bias: dict[int, float]
) -> None:
    prompt = min(prompt, len(tokens))
    logits = some_logits(8)
    expected = logits.tolist()
    for token in range(VOCAB):
        if token in tokens:
            expected[token] *= 1 / repetition if expected[token] > 0 else repetition
        times = tokens[prompt:].count(token)
        expected[token] -= times * frequency + (times > 0) * presence
        expected[token] += bias.get(token, 0.0)
    found = one(
        logits, tokens, prompt, temperature=0.0, repetition_penalty=repetition, frequency_penalty=frequency,
        presence_penalty=presence, logit_bias=tuple(bias.items()),
    )  # fmt: skip
    assert expected[found] == pytest.approx(max(expected), abs=1e-4)


def test_penalties_come_before_temperature_and_filters() -> None:
    logits = torch.tensor([5.0, 4.9, 0.0])
    assert set(draws(logits, 50, prompt=(0,), repetition_penalty=10.0, top_k=2, temperature=0.1)) == {1}


def test_the_logits_given_are_left_alone() -> None:
    logits = some_logits(9)[None]
    before = logits.clone()
    sample(logits, [Draw(Sampling(repetition_penalty=1.5, temperature=0.5, top_p=0.5), [1, 2, 3], 1)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("new_tokens", "expected"), [(0, 1), (1, 1), (2, 0), (3, 0)])
def test_min_tokens_masks_the_stop_tokens_until_enough_are_written(new_tokens: int, expected: int) -> None:
    logits = torch.tensor([9.0, 5.0, 1.0])
    tokens = [2] * (3 + new_tokens)
    assert one(logits, tokens, 3, temperature=0.0, min_tokens=2, stop_token_ids=(0, 77)) == expected


# -------------------------------------------------------------------------------------------------- determinism
MIXED = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, repetition_penalty=1.3),
    Sampling(temperature=0.0, logit_bias=((4, 100.0),)),
    Sampling(seed=1),
    Sampling(seed=1, temperature=0.4, top_k=20),
    Sampling(seed=2, top_p=0.8),
    Sampling(seed=3, min_p=0.05, presence_penalty=1.0),
    Sampling(seed=4, temperature=1.4, top_k=30, top_p=0.9, frequency_penalty=0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    logits = torch.stack([some_logits(seed, vocab=3000) for seed in range(len(MIXED))]).to(dtype)
    rows = [Draw(sampling, list(range(5, 5 + index)) or [1], 1) for index, sampling in enumerate(MIXED)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    back = list(reversed(range(len(rows))))
    assert sample(logits[back], [rows[i] for i in back]) == together[::-1]


def test_a_token_depends_on_seed_and_position_only() -> None:
    logits = torch.zeros(1000)
    base = Sampling(seed=5)
    assert one(logits, [1, 2, 3], 1, seed=5) == one(logits, [9, 9, 9], 2, seed=5)
    assert len({one(logits, [0] * length, 1, seed=5) for length in range(1, 30)}) > 25
    assert len({sample(logits[None], [Draw(replace(base, seed=seed), [1], 1)])[0] for seed in range(30)}) > 25


def test_top_k_of_one_is_greedy_even_between_equals() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0])
    assert set(draws(logits, 30, top_k=1)) == {1}
    assert set(draws(logits, 30, temperature=0.0)) == {1}


# ------------------------------------------------------------------------------------------------------- finish
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3], None), ([1, 2, 9], "stop"), ([1, 2, 3, 4, 5], "length"), ([1, 2, 3, 4, 9], "stop"), ([1, 9], None)],
)
def test_finish(tokens: list[int], expected: str | None) -> None:
    sampling = Sampling(max_tokens=4, stop_token_ids=(9, 8))
    assert finish(sampling, tokens, 2 if tokens == [1, 9] else 1, max_context=100) == expected


def test_finish_at_the_end_of_the_context() -> None:
    assert finish(Sampling(max_tokens=100), [1] * 31, 5, max_context=32) is None
    assert finish(Sampling(max_tokens=100), [1] * 32, 5, max_context=32) == "length"


def test_no_stop_before_min_tokens() -> None:
    sampling = Sampling(max_tokens=10, min_tokens=2, stop_token_ids=(9,))
    assert finish(sampling, [1, 9], 1, 100) is None
    assert finish(sampling, [1, 3, 9], 1, 100) is None
    assert finish(sampling, [1, 3, 4, 9], 1, 100) == "stop"
