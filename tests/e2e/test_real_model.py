"""The demo model as it is served by default, in fp32: what a newcomer sees, and the same tokens as transformers.

Everything that asks for this model is in this file, so that its two deployments take memory and time only once.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.oracle import greedy, prompts
from tests.e2e.test_loadtests import ANY_SPEED, smoke
from tests.e2e.test_tier import BLOCK, cached, prompt_of
from tests.serving import Served, serving, wait_until

TOKEN_BYTES = 46_080  # SmolLM2 in fp32: 30 layers x 2 x 3 heads x 64 x 4 bytes
NEW = 24
ALONE = 12  # new tokens where requests do not share their steps, which takes several times as long per token


@pytest.fixture(scope="module")
def cases(smollm2: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt, the tokens that must follow)."""
    return [(prompt, greedy(smollm2, tuple(prompt), NEW)) for prompt in prompts(smollm2)]


@pytest.fixture(scope="module")
def disaggregated(smollm2: Path) -> Iterator[Served]:
    """One prefill and one decode worker. Every prompt is handed over: by time, those of a few tokens would be computed
    where they are decoded."""
    with serving(str(smollm2), "--dtype", "float32", "--placement", "least_loaded") as served:
        yield served


@pytest.fixture(scope="module")
def aggregated(smollm2: Path) -> Iterator[Served]:
    """One worker that does both."""
    with serving(str(smollm2), "--dtype", "float32", "--prefill", "0") as served:
        yield served


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


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=60)


def model_name(served: Served) -> str:
    return client(served).models.list().data[0].id


def test_the_capital_of_france(disaggregated: Served) -> None:
    stream = client(disaggregated).chat.completions.create(
        model=model_name(disaggregated),
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3
    assert "Paris" in "".join(pieces)


@pytest.mark.parametrize("length", [5, 32, 47])
def test_every_kv_byte_moves_through_the_store(disaggregated: Served, length: int) -> None:
    prompt = [random.randrange(1000, 40_000) for _ in range(length)]
    before = disaggregated.metric("tandem_handoff_bytes_total")
    assert disaggregated.complete(prompt, 4, ignore_eos=True).usage["prompt_tokens"] == length
    moved = lambda: disaggregated.metric("tandem_handoff_bytes_total") - before  # noqa: E731
    wait_until(lambda: moved() == length * TOKEN_BYTES, 10, lambda: f"{moved() / TOKEN_BYTES} of {length} tokens")


def test_prefill_and_decode_are_different_processes(disaggregated: Served) -> None:
    workers = {w["role"]: w["pid"] for w in disaggregated.status()["workers"]}
    assert workers.keys() == {"prefill", "decode"}
    assert len(set(workers.values()) | {disaggregated.process.pid}) == 3
    for pid in workers.values():
        os.kill(pid, 0)


def test_a_repeated_prompt_is_reported_as_cached(disaggregated: Served) -> None:
    prompt = [random.randrange(1000, 40_000) for _ in range(50)]
    first, again = (disaggregated.complete(prompt, 4, ignore_eos=True) for _ in range(2))
    assert first.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert again.usage["prompt_tokens_details"]["cached_tokens"] == 48
    assert again.tokens == first.tokens


def test_a_seed_gives_the_same_text_in_both_modes(disaggregated: Served, aggregated: Served) -> None:
    ask = {"ignore_eos": True, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    texts = [
        served.complete("Once upon a time", 24, **ask).text for served in (disaggregated, aggregated, disaggregated)
    ]
    assert len(set(texts)) == 1
    assert disaggregated.complete("Once upon a time", 24, **{**ask, "seed": 8}).text != texts[0]


def test_stop_strings_end_the_text_before_them(disaggregated: Served) -> None:
    whole = disaggregated.complete("Count: 1, 2, 3, 4,", 32, ignore_eos=True).text
    stop = whole[10:13]
    for stream in (False, True):
        cut = disaggregated.complete("Count: 1, 2, 3, 4,", 32, stream, ignore_eos=True, stop=stop)
        assert (cut.text, cut.finish) == (whole[: whole.index(stop)], "stop")
    disaggregated.assert_no_leaks()


def test_the_next_turn_hits_what_decode_produced(disaggregated: Served, smollm2: Path) -> None:
    """Turn 1 is prefilled by one worker and decoded by the other; turn 2 is prefilled by the first, which never had
    the decoded blocks."""
    prompt = prompt_of(50, seed=2, low=1000, high=40_000)
    before = disaggregated.metric("tandem_offloaded_blocks_total")
    first = disaggregated.complete(prompt, 100, ignore_eos=True)
    history = prompt + first.tokens
    full = (len(history) - 1) // BLOCK  # the last token's KV was never computed
    question = prompt_of(20, seed=3, low=1000, high=40_000)
    written = lambda: disaggregated.metric("tandem_offloaded_blocks_total") - before  # noqa: E731
    # the prompt's full blocks are in the store since the handoff
    wait_until(lambda: written() >= full - len(prompt) // BLOCK, 20, lambda: str(disaggregated.metrics()))
    second = disaggregated.complete(history + question, 16, ignore_eos=True)
    assert cached(second.usage) == full * BLOCK
    assert cached(second.usage) > len(prompt)
    assert second.tokens == greedy(smollm2, tuple(history + question), 16)
    disaggregated.assert_no_leaks()


def test_a_chat_hits_its_own_history(disaggregated: Served) -> None:
    def ask(messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {"messages": messages, "temperature": 0, "max_tokens": 120}
        response = disaggregated.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    messages = [
        {"role": "user", "content": "Tell me a short story about a lighthouse keeper and her small brass lamp."}
    ]
    turn = ask(messages)
    messages.append(turn["choices"][0]["message"])
    reached = turn["usage"]["total_tokens"]
    messages.append({"role": "user", "content": "What happened next?"})
    wait_until(lambda: cached(ask(messages)["usage"]) >= (reached - 1) // BLOCK * BLOCK - BLOCK, 20)


def test_the_smoke_set_of_load_tests(disaggregated: Served, tmp_path: Path) -> None:
    names = ("chat", "code", "trace")
    limits = tmp_path / "slo.toml"
    limits.write_text(ANY_SPEED)
    options = ("--only", ",".join(names), "--seconds", "3", "--users", "2", "--rate", "1", "--slo", str(limits))
    smoke(disaggregated.mark, tmp_path, "--url", disaggregated.url, *options)
    for name in names:
        assert json.loads((tmp_path / f"{name}.json").read_text())["scenarios"][name]["requests"] > 0
