"""Clients that leave, and streams that break."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.router.harness import Api, events


@pytest.mark.parametrize("prefill_at", [0, None])
def test_a_client_that_leaves_mid_stream(api: Api, prefill_at: int | None) -> None:
    """In front of the first token, and after some: both legs are aborted."""
    api.workers["p1"].hold_at, api.workers["d1"].hold_at = prefill_at, 3
    with _connection(api) as connection:
        _send(connection, {"prompt": [9, 9], "max_tokens": 50, "stream": True})
        if prefill_at is None:
            received = b""
            while b"data: " not in received:
                received += connection.recv(65536)
        api.wait(lambda: api.workers["d1"].jobs)
    api.wait(lambda: api.workers["p1"].aborted and api.workers["d1"].aborted)
    api.quiet()
    api.wait(lambda: 'tandem_requests_total{outcome="cancelled"} 0.0' not in api.http.get("/metrics").text)


def test_a_client_that_leaves_before_its_whole_answer(api: Api) -> None:
    api.workers["d1"].hold_at = 3
    with _connection(api) as connection:
        _send(connection, {"prompt": [9, 9], "max_tokens": 50, "n": 3})
        api.wait(lambda: len(api.workers["d1"].jobs) == 3)
    api.wait(lambda: len(api.workers["p1"].aborted) == len(api.workers["d1"].aborted) == 3)
    api.quiet()


def test_a_choice_that_fails_ends_the_others(api: Api) -> None:
    """One typed error, and nothing goes on computing for nobody."""
    api.workers["d1"].hold_at = 3
    with api.http.stream(
        "POST", "/v1/completions", json={"prompt": [9, 9], "max_tokens": 9, "stream": True, "n": 4}
    ) as stream:
        frames = stream.iter_text()
        text = next(frames)
        api.wait(lambda: len(api.workers["d1"].jobs) == 4)
        api.workers["d1"].fail_held = ("invalid_value", "broken")
        api.set(api.workers["d1"].go.set)
        text += "".join(frames)
    assert text.endswith("data: [DONE]\n\n")
    error = json.loads(text.split("\n\n")[-3].removeprefix("data: "))["error"]
    assert error == {"message": "broken", "type": "invalid_request_error", "param": None, "code": "invalid_value"}
    assert text.count('"error"') == 1
    api.quiet()


def test_losing_the_decode_worker_mid_stream_shows_as_a_pause(model_directory: Path) -> None:
    with Api(model_directory).serving("pdd") as api:
        for worker_id in ("d1", "d2"):
            api.workers[worker_id].hold_at = 5
        with api.http.stream(
            "POST", "/v1/completions", json={"prompt": [9, 9], "max_tokens": 20, "stream": True}
        ) as stream:
            frames = stream.iter_raw()
            raw = next(frames)
            api.wait(lambda: api.workers["d1"].running or api.workers["d2"].running)
            victim = next(worker for worker in api.workers.values() if worker.running)
            api.workers["d1" if victim.id == "d2" else "d2"].hold_at = None
            api.run(victim.die())
            raw += b"".join(frames)
        whole = api.complete(prompt=[9, 9], max_tokens=20).json()["choices"][0]
        response = httpx.Response(200, content=raw)
        assert "".join(chunk["choices"][0]["text"] for chunk in events(response)) == whole["text"]
        assert events(response)[-1]["choices"][0]["finish_reason"] == "length"


def test_losing_the_only_worker_ends_the_stream_with_an_error_frame(model_directory: Path) -> None:
    with Api(model_directory).serving("d") as api:
        api.workers["d1"].hold_at = 2
        with api.http.stream(
            "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "stream": True}
        ) as s:
            frames = s.iter_text()
            text = next(frames)
            api.run(api.workers["d1"].die())
            text += "".join(frames)
        assert text.endswith("data: [DONE]\n\n")
        assert json.loads(text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"] == "worker_lost"
        refused = api.chat()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert api.http.get("/ready").status_code == 503
        assert api.http.get("/health").status_code == 200


def _connection(api: Api) -> socket.socket:
    parts = urlsplit(api.url)
    assert parts.hostname
    assert parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def _send(connection: socket.socket, body: dict[str, object]) -> None:
    payload = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(payload) + payload)
