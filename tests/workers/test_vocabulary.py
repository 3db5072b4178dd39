"""Sampling over parts of the vocabulary against sampling over all of it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import Sampling
from workers.draw import Draw
from workers.sampling import sample
from workers.shard import Sizes, shards
from workers.vocabulary import sample_slice


class ThreadLinks:
    """Between threads that are the tensor ranks of one stage."""

    def __init__(self, tp: int) -> None:
        self.gathers = 0
        self._offers: list[torch.Tensor] = [torch.empty(0)] * tp
        self._barrier = threading.Barrier(tp, timeout=20)

    def rank(self, index: int) -> "RankLinks":
        return RankLinks(self, index)

    def exchange(self, index: int, x: torch.Tensor) -> torch.Tensor:
        self._offers[index] = x
        self._barrier.wait()
        found = torch.stack(self._offers)
        if self._barrier.wait() == 0:
            self.gathers += 1
        self._barrier.wait()
        return found

    def abort(self) -> None:
        self._barrier.abort()


class RankLinks:
    def __init__(self, links: ThreadLinks, index: int) -> None:
        self._links, self._index = links, index

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._links.exchange(self._index, x)

    def sum_inplace(self, x: torch.Tensor) -> None:
        raise AssertionError("sampling adds nothing up")

    def send(self, x: torch.Tensor) -> None:
        raise AssertionError("sampling sends nothing on")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("sampling waits for no stage")

    def close(self) -> None:
        pass


def in_slices(logits: torch.Tensor, draws: list[Draw], tp: int) -> tuple[list[int], int]:
    """The tokens, and how many gathers they took."""
    vocabulary = logits.shape[1]
    parts = shards(Sizes(heads=12, kv_heads=12, layers=1, intermediate=12, vocabulary=vocabulary), tp, 1)
    links = ThreadLinks(tp)

    def rank(index: int) -> list[int]:
        first, last = parts[index].vocabulary
        try:
            return sample_slice(logits[:, first:last], draws, parts[index], vocabulary, links.rank(index))
        except Exception:
            links.abort()
            raise

    with ThreadPoolExecutor(tp) as pool:
        found = list(pool.map(rank, range(tp)))
    assert all(tokens == found[0] for tokens in found)
    return found[0], links.gathers


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 290, 100_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.8, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.4]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.1]),
    logit_bias=st.lists(st.tuples(st.integers(0, 1500), st.sampled_from([-100.0, 3.0, 100.0])), max_size=3).map(tuple),
    min_tokens=st.sampled_from([0, 0, 50]),
    stop_token_ids=st.sampled_from([(), (1,), (0, 7, 2000)]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    tp=st.sampled_from([2, 3, 4]),
    vocabulary=st.sampled_from([5, 50, 199, 1030, 1501]),
    spread=st.sampled_from([0.01, 0.5, 4.0]),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_the_token_of_the_whole_vocabulary(
    data: Any, tp: int, vocabulary: int, spread: float, ties: bool, dtype: torch.dtype
) -> None:
    drawn = data.draw(st.lists(samplings, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(len(drawn), vocabulary, generator=generator) * spread
    if ties:
        logits = (logits * 2 / spread).round() * spread / 2
    rows = [
        Draw(sampling, data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=2, max_size=9)), 2)
        for sampling in drawn
    ]
    logits = logits.to(dtype)
    assert in_slices(logits, rows, tp)[0] == sample(logits, rows)


@pytest.mark.parametrize(
    ("parameters", "gathers"),
    [
        ({"temperature": 0.0}, 1), ({"temperature": 0.0, "repetition_penalty": 1.3}, 1), ({"seed": 1}, 1),
        ({"seed": 1, "min_p": 0.1}, 2), ({"seed": 1, "top_k": 40}, 3), ({"seed": 1, "top_p": 0.9, "min_p": 0.1}, 3),
    ],
    ids=str,
)  # fmt: skip
def test_how_many_gathers_a_token_takes(parameters: dict[str, Any], gathers: int) -> None:
    logits = torch.randn(3, 2001, generator=torch.Generator().manual_seed(1)) * 3
    rows = [Draw(Sampling(**parameters), [1, 2, 3], 2)] * 3
    assert in_slices(logits, rows, 3) == (sample(logits, rows), gathers)


@pytest.mark.parametrize(
    ("parameters", "change"),
    [
        ({"top_p": 0.97}, lambda x: x * 0.1),  # the nucleus is larger than the candidates
        ({"top_k": 700}, lambda x: x),
        ({"top_k": 5}, lambda x: x.clamp(max=0.0)),  # half of the vocabulary is equal, at the boundary
        ({"top_p": 0.5}, torch.zeros_like),
    ],
)
def test_candidates_that_do_not_decide_are_followed_by_all(
    parameters: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    logits = change(torch.randn(20, 2001, generator=torch.Generator().manual_seed(2)) * 0.7)
    rows = [Draw(Sampling(seed=seed, **parameters), [1, 2], 1) for seed in range(20)]
    assert in_slices(logits, rows, 3) == (sample(logits, rows), 4)


def test_the_largest_logits_may_all_be_in_one_part() -> None:
    logits = torch.randn(8, 999, generator=torch.Generator().manual_seed(3))
    logits[:, 700:720] += 20.0
    rows = [Draw(Sampling(seed=seed, top_k=9, top_p=0.9), [1], 1) for seed in range(8)]
    found, _ = in_slices(logits, rows, 4)
    assert found == sample(logits, rows)
    assert all(700 <= token < 720 for token in found)
