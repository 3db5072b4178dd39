"""The oracle: served tokens equal transformers' `generate` on the same fp32 weights, whichever way they are served."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.oracle import greedy, prompts
from tests.serving import Served

NEW = 24
ALONE = 12  # new tokens where requests do not share their steps, which takes several times as long per token


@pytest.fixture(scope="module")
def cases(smollm2: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt, the tokens that must follow)."""
    return [(prompt, greedy(smollm2, tuple(prompt), NEW)) for prompt in prompts(smollm2)]


@pytest.fixture(params=["disaggregated", "aggregated"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


def complete(served: Served, prompt: list[int], new: int, stream: bool) -> list[int]:
    done = served.complete(prompt, new, stream, ignore_eos=True)
    assert done.finish == "length"
    assert done.usage["prompt_tokens"] == len(prompt)
    assert done.usage["completion_tokens"] == new
    return done.tokens


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stream", "at_once"), [(False, 1), (True, 16)])
def test_tokens_equal_transformers(
    served: Served, cases: list[tuple[list[int], list[int]]], stream: bool, at_once: int
) -> None:
    """The first time each prompt is computed, from then on it is a prefix hit."""
    new = ALONE if at_once == 1 else NEW
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda case: complete(served, case[0], new, stream), cases))
    wrong = {
        len(prompt): next(i for i in range(new) if got[i : i + 1] != want[i : i + 1])
        for (prompt, want), got in zip(cases, results, strict=True)
        if got != want[:new]
    }
    assert wrong == {}, "prompt length -> first differing token"
    served.assert_no_leaks()
