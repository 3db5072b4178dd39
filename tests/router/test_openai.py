"""Bodies that are refused, and what the error says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.errors import InvalidRequest
from router.openai import UNSUPPORTED, ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"prompt": "hi"}

BAD_NUMBERS: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, "7", True, 2**31, 10**40],
    "temperature": [-0.1, 2.1, float("nan"), float("inf"), "1", True, 10**400],
    "top_p": [0, -1, 1.1, float("nan"), "0.5"],
    "top_k": [-2, 1.5, "3", 2**40],
    "min_p": [-0.1, 1.1, float("-inf")],
    "n": [0, -1, 17, 1.5, "2"],
    "seed": [2**63, -(2**63) - 1, 1.5, "1"],
    "frequency_penalty": [-2.1, 2.1, float("nan")],
    "presence_penalty": [-2.1, 2.1, "1"],
    "repetition_penalty": [0, -1, 101, float("inf")],
    "min_tokens": [-1, 1.5, "1"],
    "ignore_eos": [1, "true"],
    "stream": ["yes", 1],
    "stop_token_ids": [5, ["5"], [1.5], [5] * 2000],
    "cache_salt": ["", "x" * 129, 5],
    "exact_kv": [1, "true"],
    "best_of": [0, 17, "1"],
    "stream_options": [5, {"include_usage": "yes"}],
    "model": [5, ["m"]],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_NUMBERS.items() for value in values]
)
def test_values_out_of_range_or_of_the_wrong_type(field: str, value: Any) -> None:
    for cls, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        with pytest.raises(ValidationError) as error:
            cls.model_validate({**body, field: value})
        assert error.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
        ({"logit_bias": {"1": "2"}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ],
)
def test_values_that_make_no_sense(fields: dict[str, Any], param: str) -> None:
    for cls, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        with pytest.raises(InvalidRequest) as error:
            cls.model_validate({**body, **fields})
        assert error.value.param == param
        assert len(error.value.message) < 300


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_named(field: str) -> None:
    for value in ({"type": "json_object"}, [{"type": "function"}], "auto", 5, 0.5):
        with pytest.raises(InvalidRequest, match="not supported") as error:
            ChatRequest.model_validate({**CHAT, field: value})
        assert error.value.param == field
    for harmless in (None, *UNSUPPORTED[field]):
        request = ChatRequest.model_validate({**CHAT, field: harmless})
        assert request.ignored_fields == ""


def test_logprobs_zero_asks_for_something() -> None:
    with pytest.raises(InvalidRequest):
        CompletionRequest.model_validate({**COMPLETION, "logprobs": 0})


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""], [[1], []]])
def test_an_empty_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        CompletionRequest.model_validate({"prompt": prompt})


@pytest.mark.parametrize("prompt", [None, 5, {"a": 1}, [1.5], [True], ["a", 1], [["a"]], [[1.0]], [[[1]]], [None]])
def test_a_prompt_of_the_wrong_shape(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be a string"):
        CompletionRequest.model_validate({"prompt": prompt})


def test_too_many_choices() -> None:
    with pytest.raises(InvalidRequest, match="at most 256"):
        CompletionRequest.model_validate({"prompt": ["a"] * 17, "n": 16})
    with pytest.raises(InvalidRequest, match="at most 256"):
        CompletionRequest.model_validate({"prompt": ["a"] * 257})


@pytest.mark.parametrize(
    "messages", [[], None, "hi", [5], [{}], [{"role": "robot", "content": "x"}], [{"content": "x"}]]
)
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate({"messages": messages})
    assert error.value.errors()[0]["loc"][0] == "messages"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user"}, "needs content"),
        ({"role": "user", "content": None}, "needs content"),
        ({"role": "user", "content": 5}, "string or a list"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "'image_url' is not supported",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "a content part must be"),
        ({"role": "user", "content": ["x"]}, "a content part must be"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "not supported"),
    ],
)
def test_content_that_cannot_be_served(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as error:
        ChatRequest.model_validate({"messages": [message]})
    assert error.value.param == "messages"


def test_the_newer_limit_wins() -> None:
    assert ChatRequest.model_validate({**CHAT, "max_tokens": 5, "max_completion_tokens": 9}).token_limit == 9
    assert ChatRequest.model_validate(CHAT).token_limit is None
    assert CompletionRequest.model_validate(COMPLETION).token_limit == 16


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools"]), JSON))
def test_any_body_is_accepted_or_refused_but_never_a_crash(body: dict[str, Any]) -> None:
    for cls in (ChatRequest, CompletionRequest):
        try:
            cls.model_validate(body)
        except (ValidationError, InvalidRequest):
            continue
