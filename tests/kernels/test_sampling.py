"""The noise is the hash it claims to be, is Gumbel distributed, and does not correlate between coordinates."""

import math

import torch

from kernels import reference
from kernels.sampling import gumbel, key, sample_rows

IDS = torch.arange(50_000)
PINNED_KEY = (1072924147, 1340723871)
PINNED_NOISE = [-1.023213, -0.310431, 0.787733]


def test_equals_the_statement_in_python_integers() -> None:
    for seed, position in [(0, 0), (1, 5), (2**63 + 11, 131_071), (-3, 2)]:
        noise = gumbel(seed, position, torch.tensor([0, 1, 31, 151_935]))
        expected = [reference.gumbel(key(seed, position), token) for token in (0, 1, 31, 151_935)]
        torch.testing.assert_close(noise.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_pinned_values_so_that_no_version_draws_other_tokens() -> None:
    assert key(1234, 56) == PINNED_KEY
    torch.testing.assert_close(
        gumbel(1234, 56, torch.tensor([0, 7, 49_151])), torch.tensor(PINNED_NOISE), rtol=1e-5, atol=1e-6
    )


def test_a_subset_of_the_vocabulary_gets_the_same_noise() -> None:
    some = torch.tensor([40_000, 3, 777])
    assert torch.equal(gumbel(9, 10, IDS)[some], gumbel(9, 10, some))


def test_the_ids_are_left_alone() -> None:
    ids = torch.arange(10)
    gumbel(1, 2, ids)
    assert torch.equal(ids, torch.arange(10))


def test_uniform_after_the_gumbel_distribution_function() -> None:
    buckets = 64
    for seed in range(4):
        uniform = (-(-gumbel(seed, 17, IDS).double()).exp()).exp()
        counts = torch.histc(uniform, buckets, 0, 1)
        expected = len(IDS) / buckets
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 120  # 63 degrees of freedom: exceeded once in 60,000


def test_no_correlation_between_seeds_positions_and_neighbouring_tokens() -> None:
    limit = 5 / math.sqrt(len(IDS))  # five standard deviations
    base = gumbel(5, 100, IDS)
    others = [
        gumbel(5, 101, IDS),
        gumbel(6, 100, IDS),
        gumbel(5 ^ 2**40, 100, IDS),
        base.roll(1),
        gumbel(5, 101, IDS).roll(1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((base, other)))[0, 1])) < limit


def test_rows_are_drawn_from_what_the_filters_leave() -> None:
    """Against the worker's sampler: tests/kernels/interpreted/test_sampling.py. Here, each filter by itself."""
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]).expand(400, -1)
    words = torch.tensor([key(seed, 1) for seed in range(400)])
    for expected, temperature, top_k, top_p, min_p in [
        ({1}, 0.0, 0, 1.0, 0.0),
        ({1}, 1.0, 1, 1.0, 0.0),
        ({1, 2, 3}, 1.0, 2, 1.0, 0.0),  # equals live or die together
        ({1, 2, 3}, 1.0, 0, 0.8, 0.0),
        ({0, 1, 2, 3}, 1.0, 0, 1.0, 0.1),
        ({0, 1, 2, 3, 4}, 1.0, 0, 1.0, 0.0),
    ]:
        rows = [torch.full((400,), each) for each in (temperature, top_k, top_p, min_p)]
        assert set(sample_rows(logits, *rows, words).tolist()) == expected
