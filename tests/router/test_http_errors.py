"""Every error has OpenAI's shape, the right status, and says little about what was sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cluster.messages import Refused
from router.app import BODY_LIMIT
from tests.router.harness import MAX_CONTEXT, MODEL, Api

CHAT = "/v1/chat/completions"


def error_of(response: httpx.Response, status: int, code: str = "invalid_value") -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert len(response.content) < 1000
    error: dict[str, Any] = body["error"]
    return error


NOT_JSON = [
    b"",
    b"{",
    b"nonsense",
    b'{"messages": [}',
    b'{"temperature": NaN}',
    b'{"a": "\\ud800"}',
    b"\xff\xfe",
    b"[" * 5000,
    b"1" * 5000,
]


@pytest.mark.parametrize("body", NOT_JSON)
def test_bodies_that_are_not_json(api: Api, body: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        response = api.http.post(path, content=body, headers={"content-type": "application/json"})
        assert error_of(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", ["[]", "5", '"x"', "null", "[1]"])
def test_json_that_is_not_an_object(api: Api, body: str) -> None:
    error_of(api.http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "garbage", ""])
def test_the_wrong_content_type(api: Api, content_type: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    response = api.http.post(CHAT, content=body, headers={"content-type": content_type})
    assert "application/json" in error_of(response, 400)["message"]


def test_the_field_is_named(api: Api) -> None:
    assert error_of(api.chat(temperature=9), 400)["param"] == "temperature"
    assert error_of(api.chat(messages=[]), 400)["param"] == "messages"
    assert error_of(api.chat(messages=[{"role": "robot", "content": "x"}]), 400)["param"] == "messages.0.role"
    assert error_of(api.complete(prompt=""), 400)["param"] == "prompt"
    assert error_of(api.http.post("/v1/completions", json={}), 400)["param"] == "prompt"
    assert error_of(api.chat(tools=[{"type": "function"}]), 400)["param"] == "tools"


def test_token_ids_must_exist(api: Api) -> None:
    for bad in (-1, 300, 2**63):
        assert error_of(api.complete(prompt=[5, bad]), 400)["param"] == "prompt"
        assert error_of(api.chat(stop_token_ids=[bad]), 400)["param"] == "stop_token_ids"
    assert error_of(api.chat(logit_bias={"300": 1}), 400)["param"] == "logit_bias"


def test_input_is_not_echoed_at_length(api: Api) -> None:
    long = "x" * 20_000
    for body in (
        {"model": long},
        {long: 1, "temperature": 9},
        {"stop": [long] * 2},
        {"messages": [{"role": long, "content": ""}]},
    ):
        response = api.chat(**body)
        assert not response.is_success
        assert "x" * 201 not in response.text
    response = api.http.get("/" + long)
    assert "x" * 201 not in response.text


def test_unknown_model(api: Api) -> None:
    assert error_of(api.chat(model="other"), 404, "model_not_found")["param"] == "model"
    assert api.http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).is_success


def test_prompts_that_do_not_fit(api: Api) -> None:
    message = error_of(api.complete(prompt=[9] * MAX_CONTEXT), 400, "context_length_exceeded")["message"]
    assert message.startswith(
        f"This model's maximum context length is {MAX_CONTEXT} tokens."
        f" However, your prompt contains {MAX_CONTEXT} input tokens"
    )
    error_of(api.chat(messages=[{"role": "user", "content": "z " * 300}]), 400, "context_length_exceeded")


def test_unknown_routes_and_methods(api: Api) -> None:
    error_of(api.http.get("/"), 404)
    error_of(api.http.post("/v1/embeddings", json={}), 404)
    response = api.http.get(CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(api.http.get("/v1/models/nope"), 404, "model_not_found")


def test_bodies_over_the_limit(api: Api) -> None:
    body = b'{"prompt": "%b"}' % (b"x" * (BODY_LIMIT + 1))
    declared = api.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error_of(declared, 413, "body_too_large")

    def chunks() -> Any:
        for at in range(0, len(body), 2**20):
            yield body[at : at + 2**20]

    chunked = api.http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    error_of(chunked, 413, "body_too_large")


def test_a_full_queue(api: Api) -> None:
    """Eight may wait while the only decode worker has no slot; the next is refused, and those eight are served."""
    api.workers["d1"].load = {"running": 65}
    api.wait(lambda: 65 in [worker["running"] for worker in api.http.get("/status").json()["workers"]])
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(api.chat, max_tokens=1, stream=number % 2 == 0) for number in range(8)]
        api.wait(lambda: 'tandem_queue_requests{priority="normal"} 8.0' in api.http.get("/metrics").text)
        for stream in (False, True):
            response = api.chat(max_tokens=1, stream=stream)
            error_of(response, 429, "server_overloaded")
            assert 1 <= int(response.headers["retry-after"]) <= 30
        api.workers["d1"].load = {}
        assert all(answer.result(timeout=10).is_success for answer in waiting)


def test_workers_that_all_refuse(api: Api) -> None:
    for worker in api.workers.values():
        worker.refuse = Refused("service_unavailable", "draining")
    response = api.chat(stream=True)
    error_of(response, 503, "service_unavailable")
    assert int(response.headers["retry-after"]) >= 1


def test_a_bug_says_nothing_of_our_insides(api: Api) -> None:
    for worker in api.workers.values():
        worker.fail = ("no such code", "detail")
    response = api.chat()
    error = error_of(response, 500, "internal_error")
    assert error["type"] == "server_error"
    assert "detail" not in error["message"]
    assert "x-request-id" in response.headers


def test_model_may_be_left_out_or_null(api: Api) -> None:
    assert api.chat(model=None, max_tokens=1).json()["model"] == MODEL
