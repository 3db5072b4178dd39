"""The whole surface with the official client and with raw HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from cluster.messages import Refused
from tests.router.fakes import EOS, tokens_for
from tests.router.harness import MAX_CONTEXT, MODEL, Api, events, prompt_of

USER: Any = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_directory / "tokenizer.json"))


# --------------------------------------------------------------------------------------------------- the normal path
def test_chat(api: Api, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    api.workers["p1"].cached_tokens = 3
    answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=6)
    expected = tokenizer.decode(tokens_for(prompt_of(api), 6))
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt_of(api))
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat_stream_joins_to_the_whole(api: Api, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=30)
    stream = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * (len(chunks) - 2) + ["length"]
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()


def test_a_stream_as_it_is_on_the_wire(api: Api) -> None:
    response = api.chat(max_tokens=2, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = events(response)
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_the_first_token_is_sent_at_once(api: Api) -> None:
    api.workers["d1"].hold_at = 1
    with api.http.stream(
        "POST", "/v1/completions", json={"prompt": [70, 71], "max_tokens": 3, "stream": True}
    ) as stream:
        first = next(stream.iter_bytes())
        assert b'"text"' in first
        assert b"[DONE]" not in first
        api.set(api.workers["d1"].go.set)


def test_completion(api: Api, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=5)
    assert prompt_of(api) == tokenizer.encode("hello").ids
    assert answer.choices[0].text == tokenizer.decode(tokens_for(prompt_of(api), 5))
    assert client.completions.create(model=MODEL, prompt="hello").usage.completion_tokens == 16  # type: ignore[union-attr]


def test_completion_stream(api: Api, client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="hello", max_tokens=20).choices[0].text
    chunks = list(client.completions.create(model=MODEL, prompt="hello", max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_prompts_and_choices_keep_their_order(api: Api, tokenizer: Tokenizer) -> None:
    body = api.complete(prompt=[[10, 11], [12, 13, 14]], n=2, max_tokens=3).json()
    texts = [tokenizer.decode(tokens_for(prompt, 3)) for prompt in ([10, 11], [12, 13, 14])]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [texts[0], texts[0], texts[1], texts[1]]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 12
    chunks = events(api.complete(prompt=[[10, 11], [12, 13, 14]], n=2, max_tokens=3, stream=True))
    joined = ["", "", "", ""]
    for chunk in chunks:
        joined[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert joined == [choice["text"] for choice in body["choices"]]


def test_a_list_of_strings_and_a_list_of_tokens(api: Api) -> None:
    assert len(api.complete(prompt=["a", "b", "c"], max_tokens=1).json()["choices"]) == 3
    assert api.complete(prompt=[10, 11, 12], max_tokens=2).json()["usage"]["prompt_tokens"] == 3


def test_echo(api: Api, tokenizer: Tokenizer) -> None:
    text = api.complete(prompt="hello", echo=True, max_tokens=2).json()["choices"][0]["text"]
    assert text == "hello" + tokenizer.decode(tokens_for(tokenizer.encode("hello").ids, 2))
    ids = tokenizer.encode("world", add_special_tokens=False).ids
    streamed = events(api.complete(prompt=ids, echo=True, max_tokens=2, stream=True, stop="h"))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed).startswith("world")


def test_sampling_reaches_the_worker(api: Api) -> None:
    api.chat(
        max_tokens=100, max_completion_tokens=7, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=2**63 - 1, n=2,
        frequency_penalty=-2, presence_penalty=2, repetition_penalty=1.1, logit_bias={"9": -100, "3": 1.5},
        stop_token_ids=[5], min_tokens=2, best_of=2,
    )  # fmt: skip
    first, second = sorted((g.sampling for g in api.workers["p1"].generations), key=lambda s: -s.seed)
    assert (first.max_tokens, first.min_tokens, first.temperature, first.top_p, first.top_k) == (7, 2, 0.0, 0.5, 0)
    assert (first.min_p, first.frequency_penalty, first.presence_penalty) == (0.1, -2.0, 2.0)
    assert (first.repetition_penalty, first.logit_bias) == (1.1, ((3, 1.5), (9, -100.0)))
    assert first.stop_token_ids == (5, EOS)
    assert (first.seed, second.seed) == (2**63 - 1, 0)  # seed + 1, kept within 63 bits


def test_defaults(api: Api) -> None:
    api.chat(ignore_eos=True)
    api.chat()
    ignoring, default = (generation.sampling for generation in api.workers["p1"].generations)
    assert default.max_tokens == MAX_CONTEXT - len(prompt_of(api))
    assert (default.temperature, default.top_p, default.stop_token_ids) == (1.0, 1.0, (EOS,))
    assert ignoring.stop_token_ids == ()
    assert ignoring.seed != default.seed


def test_max_tokens_is_cut_to_what_fits(api: Api) -> None:
    assert api.complete(prompt=[9] * (MAX_CONTEXT - 2), max_tokens=5000).json()["usage"]["completion_tokens"] == 2


def test_the_salt_separates(api: Api) -> None:
    for salt in ("one", "two", None):
        api.chat(cache_salt=salt, max_tokens=1)
    salts = [generation.salt for generation in api.workers["p1"].generations]
    assert len(set(salts)) == 3


@pytest.mark.parametrize(("quantization", "asked"), [("none", None), ("int8", None), ("int8", False), ("int8", True)])
def test_approximate_kv_is_for_requests_that_do_not_refuse_it(
    model_directory: Path, quantization: str, asked: bool | None
) -> None:
    with Api(model_directory).serving("pd", kv_quantization=quantization) as api:
        api.chat(max_tokens=2, exact_kv=asked)
        api.complete(max_tokens=2, exact_kv=asked)
        generations = [generation for worker in api.workers.values() for generation in worker.generations]
        assert len(generations) == 4
        assert all(generation.exact is (quantization == "none" or asked is True) for generation in generations)


@pytest.mark.parametrize("quantization", ["int8-cache", "e4m3-cache"])
def test_exact_kv_is_refused_where_there_is_none(model_directory: Path, quantization: str) -> None:
    with Api(model_directory).serving("pd", kv_quantization=quantization, runner="cuda") as api:
        for answer in (api.chat(max_tokens=2, exact_kv=True), api.complete(max_tokens=2, exact_kv=True)):
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "exact_kv"
            assert quantization in answer.json()["error"]["message"]
        assert not any(worker.generations for worker in api.workers.values())
        for asked in (None, False):
            assert api.chat(max_tokens=2, exact_kv=asked).status_code == 200
        generations = [generation for worker in api.workers.values() for generation in worker.generations]
        assert [generation.exact for generation in generations] == [True] * 4, "there is one kind of KV, and one root"


def test_end_token_and_stop_string(api: Api, tokenizer: Tokenizer) -> None:
    for worker in api.workers.values():
        worker.eos_at = 4
    body = api.complete(prompt=[40, 41], max_tokens=10).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["text"] == tokenizer.decode(tokens_for([40, 41], 4))
    assert body["usage"]["completion_tokens"] == 5
    text = tokenizer.decode(tokens_for([42, 43], 100))
    stop = text[20:23]
    for worker in api.workers.values():
        worker.eos_at = None
    body = api.complete(prompt=[42, 43], max_tokens=100, stop=[stop, "never"]).json()
    assert body["choices"][0]["text"] == text[: text.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 100
    streamed = events(api.complete(prompt=[42, 43], max_tokens=100, stop=[stop], stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text[: text.index(stop)]


def test_a_stop_token_that_is_text_is_not_in_the_text(api: Api, tokenizer: Tokenizer) -> None:
    """As an engine ends on it: the last token of the generation is the stop token."""
    tokens = tokens_for([50, 51], 4)
    for worker in api.workers.values():
        worker.eos_at = 3
    body = api.complete(prompt=[50, 51], max_tokens=9, stop_token_ids=[EOS, 77]).json()
    assert body["choices"][0]["text"] == tokenizer.decode(tokens[:3])


def test_content_parts_and_roles(api: Api) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    assert api.chat(messages=[{"role": "user", "content": parts}], max_tokens=1).is_success
    as_parts = prompt_of(api)
    assert api.chat(messages=[{"role": "user", "content": "hello\nworld"}], max_tokens=1).is_success
    assert prompt_of(api) == as_parts
    for role in ("system", "developer", "user", "assistant", "tool"):
        messages = [{"role": role, "content": "x", "tool_call_id": "1"}]
        assert api.chat(messages=messages, max_tokens=1).is_success, role


def test_unknown_fields_are_reported(api: Api) -> None:
    response = api.chat(
        max_tokens=1, guided_jsn={}, zeta=1, metadata={"a": "b"}, store=True, user="me", service_tier="x"
    )
    assert response.headers["x-ignored-fields"] == "guided_jsn, zeta"
    streamed = api.chat(max_tokens=1, stream=True, **{"bad\r\nname": 1})
    assert streamed.headers["x-ignored-fields"] == "bad??name"
    assert "x-ignored-fields" not in api.chat(max_tokens=1).headers


def test_fields_that_ask_for_nothing_are_accepted(api: Api) -> None:
    response = api.chat(
        max_tokens=1, logprobs=False, tools=None, tool_choice="none", response_format={"type": "text"},
        top_logprobs=None, stop=None, temperature=None, stream_options=None, n=None, logit_bias=None,
        modalities=["text"],
    )  # fmt: skip
    assert response.is_success, response.text


# ------------------------------------------------------------------------------------------------- models and health
def test_models(client: openai.OpenAI, api: Api) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert api.http.get("/v1/models").json()["data"][0]["max_model_len"] == MAX_CONTEXT
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_health_and_readiness(api: Api) -> None:
    assert api.http.get("/health").status_code == 200
    assert api.http.get("/ready").json() == {"ready": True, "workers": {"prefill": 1, "decode": 1, "both": 0}}
    assert api.http.head("/health").status_code == api.http.head("/ready").status_code == 200


def test_status(api: Api) -> None:
    status = api.http.get("/status").json()
    assert status["model"] == MODEL
    assert status["redis"] == "reachable"
    worker = {worker["id"]: worker for worker in status["workers"]}["d1"]
    assert worker["connected"]
    assert (worker["role"], worker["pid"], worker["node"]) == ("decode", 4242, "node-1")
    assert (worker["kv_blocks"], worker["kv_blocks_used"], worker["running"]) == (100, 10, 0)
    assert worker["address"] == api.workers["d1"].info.address


def test_openapi_describes_the_bodies(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "temperature", "stop", "logit_bias"} <= set(fields)
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]


def test_request_ids(api: Api) -> None:
    response = api.http.get("/v1/models", headers={"x-request-id": "my-id_1.2"})
    assert response.headers["x-request-id"] == "my-id_1.2"
    response = api.http.get("/nowhere", headers={"x-request-id": "a b/c<script>" + "x" * 500})
    assert response.headers["x-request-id"].startswith("abcscriptx")
    assert len(response.headers["x-request-id"]) == 128
    assert len(api.http.get("/health").headers["x-request-id"]) == 32
    for _ in range(2):  # the same id twice at once must not collide inside
        api.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers={"x-request-id": "twin"})
    ids = [generation.id for generation in api.workers["p1"].generations]
    assert len(set(ids)) == 2
    assert all(generation_id.startswith("twin-") for generation_id in ids)


# --------------------------------------------------------------------------------------------------- official errors
def test_official_errors(api: Api, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[9] * MAX_CONTEXT)
    assert long.value.code == "context_length_exceeded"
    assert (
        f"This model's maximum context length is {MAX_CONTEXT} tokens. However, your prompt contains"
        in long.value.message
    )
    for worker in api.workers.values():
        worker.refuse = Refused("server_overloaded", "full", 3_000)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model=MODEL, prompt="x")
    assert refused.value.response.headers["retry-after"] == "3"


def test_an_error_before_the_first_token_has_a_status_even_for_streams(api: Api) -> None:
    api.workers["p1"].fail = api.workers["d1"].fail = ("invalid_value", "no such token")
    response = api.complete(stream=True)
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "no such token", "type": "invalid_request_error", "param": None, "code": "invalid_value",
    }  # fmt: skip


def test_token_ids_are_returned_only_when_asked_for(api: Api, client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "prompt": "hello world", "max_tokens": 9}
    plain = client.completions.create(**ask)
    assert "token_ids" not in plain.choices[0].model_dump()
    wanted = {"extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**ask, **wanted).choices[0].model_dump()["token_ids"]
    assert whole == tokens_for(prompt_of(api), 9)
    chunks = client.completions.create(**ask, **wanted, stream=True)
    pieces = [c.choices[0].model_dump().get("token_ids", []) for c in chunks]
    assert [token for piece in pieces for token in piece] == whole
