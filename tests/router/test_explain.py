"""The debug header that says why a request went where it went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.messages import Refused
from tests.router.harness import MODEL, Api, events

ASK = {"x-tandem-explain": "1"}
BODY = {"model": MODEL, "prompt": "hello there", "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded(model_directory: Path) -> Iterator[Api]:
    with Api(model_directory).serving("b", api_keys=("tenant-key",), operator_key="operator-key") as one:
        yield one


def ask(api: Api, headers: dict[str, str], **more: Any) -> httpx.Response:
    return api.http.post("/v1/completions", json=BODY | more, headers=headers)


def told(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    decisions: list[dict[str, Any]] = json.loads(response.headers["x-tandem-placement"])
    return decisions


def test_who_does_not_ask_is_not_told(api: Api) -> None:
    assert "x-tandem-placement" not in ask(api, {}).headers
    assert "x-tandem-placement" not in ask(api, {"x-tandem-explain": "0"}, stream=True).headers


@pytest.mark.parametrize("stream", [False, True])
def test_the_decision_has_its_route_and_every_term(api: Api, stream: bool) -> None:
    response = ask(api, ASK, stream=stream)
    (decision,) = told(response)
    assert decision["route"] == {"prefill": "p1", "decode": "d1"}
    assert (decision["policy"], decision["candidates"]) == ("least_time", 2)
    assert decision["uncached_tokens"] > 0
    other = decision["runner_up"]
    assert (other["prefill"], other["decode"]) == (None, "d1")
    assert decision["chosen"]["total_ms"] < other["total_ms"]
    terms = ("queue_ms", "prefill_ms", "fetch_ms", "handoff_ms", "decode_ms", "others_ms")
    assert sum(other[name] for name in terms) == pytest.approx(other["total_ms"], abs=0.01)
    if stream:
        assert events(response)[-1]["choices"][0]["finish_reason"] == "length"


def test_every_attempt_is_told(api: Api) -> None:
    api.workers["p1"].refuse = Refused("server_overloaded", "full")
    assert [decision["route"]["prefill"] for decision in told(ask(api, ASK))] == ["p1", None]


def test_with_keys_only_the_operator_may_ask(guarded: Api) -> None:
    tenant = {"authorization": "Bearer tenant-key"}
    operator = tenant | {"x-tandem-operator-key": "operator-key"}
    refused = ask(guarded, ASK | tenant)
    assert refused.status_code == 403
    assert "operator key" in refused.json()["error"]["message"]
    assert ask(guarded, tenant).status_code == 200
    assert told(ask(guarded, ASK | operator))[0]["route"] == {"prefill": None, "decode": "b1"}
