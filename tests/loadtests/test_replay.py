"""Replaying against a server that keeps what it was sent: prefixes, times, turns, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loadtests.replay import FIRST_TOKEN, Outcome, prompt, replay, summary
from loadtests.simulator.trace import Trace, TraceRequest

BLOCK = 8


def request(arrival_s: float = 0.0, blocks: tuple[int, ...] = (0,), tokens: int = 5, new: int = 3) -> TraceRequest:
    return TraceRequest(arrival_s, tokens, new, blocks)


def trace(*requests: TraceRequest) -> Trace:
    return Trace("made", BLOCK, requests)


@dataclass
class Server:
    """Streams one token per event, except the last two together, and says that half of the prompt was cached."""

    token_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)  # (begun, ended) per request
    url: str = ""

    async def answer(self, received: Request) -> Response:
        body = await received.json()
        self.bodies.append(body)
        if body["prompt"] == prompt(request(blocks=(666,)), BLOCK):
            return JSONResponse({"error": {"message": "no"}}, 503)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        begun, left = time.monotonic(), body["max_tokens"] - (body["prompt"] == prompt(request(blocks=(777,)), BLOCK))
        while left:
            await asyncio.sleep(self.token_s)
            some = 2 if left == 2 else 1
            left -= some
            yield f"data: {json.dumps({'choices': [{'text': 'x', 'token_ids': [7] * some}]})}\n\n"
        usage = {"prompt_tokens_details": {"cached_tokens": len(body["prompt"]) // 2}}
        self.spans.append((begun, time.monotonic()))
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


@contextmanager
def serving(token_s: float = 0.0) -> Iterator[Server]:
    state = Server(token_s)
    app = Starlette(routes=[Route("/v1/completions", state.answer, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    state.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join(20)


def run(made: Trace, url: str, **options: Any) -> list[Outcome]:
    return asyncio.run(asyncio.wait_for(replay(made, url, **options), 30))


def test_prompts_share_the_prefixes_that_the_block_ids_say() -> None:
    first = prompt(request(blocks=(1, 2, 3), tokens=20), BLOCK)
    second = prompt(request(blocks=(1, 2, 9), tokens=24), BLOCK)
    assert (len(first), len(second)) == (20, 24)
    assert first[: 2 * BLOCK] == second[: 2 * BLOCK]
    assert first[2 * BLOCK :] != second[2 * BLOCK : 20]
    small = prompt(request(blocks=(1, 2, 3), tokens=20), BLOCK, 200)
    assert all(FIRST_TOKEN <= token < 200 for token in small)


def test_what_comes_back_is_what_the_server_did() -> None:
    with serving(0.02) as server:
        outcomes = run(trace(request(), request(0.01, (4, 5), 16, 6)), server.url, model="m")
    assert [len(o.times_s) for o in outcomes] == [3, 6]
    assert [o.cached_tokens for o in outcomes] == [2, 8]
    assert not any(o.error for o in outcomes)
    assert outcomes[1].ttft_s >= 0.02
    assert outcomes[1].itls_s[-1] == 0.0, "two tokens of one event came together"
    assert outcomes[1].times_s[-1] - outcomes[1].sent_s >= 0.1, "the server waits before each of five events"
    sent = {len(body["prompt"]): body for body in server.bodies}
    assert sent[16]["prompt"] == prompt(request(blocks=(4, 5), tokens=16), BLOCK)
    assert (sent[16]["max_tokens"], sent[16]["model"], sent[16]["ignore_eos"]) == (6, "m", True)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with serving(1.0) as server:
        outcomes = run(trace(request(0.0), request(0.05), request(0.1)), server.url)
    ended = [o.times_s[-1] for o in outcomes]
    assert all(o.sent_s >= o.due_s for o in outcomes)
    assert outcomes[2].sent_s < min(ended), "all were sent before the first had been answered"


def test_a_later_turn_waits_for_the_answer_and_then_thinks() -> None:
    turns = [request(0.0)._replace(session=1, turn=0), request(0.01)._replace(session=1, turn=1, think_s=0.1)]
    with serving(0.5) as server:
        first, second = run(trace(*turns), server.url)
        assert second.sent_s >= first.times_s[-1] + 0.1
        assert server.spans[1][0] > server.spans[0][1]
        together = run(trace(*turns), server.url, open_loop=True)
        assert together[1].sent_s < together[0].times_s[0]


def test_what_fails_is_counted_and_the_rest_goes_on() -> None:
    with serving() as server:
        outcomes = run(trace(request(), request(blocks=(666,)), request()), server.url)
    assert [bool(o.error) for o in outcomes] == [False, True, False]
    assert outcomes[1].error.startswith("503")
    assert summary(outcomes)["failures"] == 1
    gone = run(trace(request()), server.url)
    assert gone[0].error.startswith("ConnectError")


def test_an_answer_that_is_too_short_is_a_failure() -> None:
    with serving() as server:
        whole, cut = run(trace(request(new=4), request(blocks=(777,), new=4)), server.url)
    assert (whole.error, len(whole.times_s)) == ("", 4)
    assert cut.error == "3 tokens came where 4 were asked for"


def test_the_figures() -> None:
    outcomes = [
        Outcome(0, 0, 100, 25, (1.0, 1.1, 1.3)),
        Outcome(1, 1.5, 100, 25, (3.5, 3.6)),
        Outcome(0, 0, 9, error="x"),
    ]
    figures = summary(outcomes)
    assert figures["hit_ratio"] == pytest.approx(0.25)
    assert figures["ttft_mean_ms"] == pytest.approx(1500)
    assert figures["ttft_p90_ms"] == pytest.approx(2000)
    assert figures["itl_mean_ms"] == pytest.approx(400 / 3)
    assert figures["itl_request_mean_ms"] == pytest.approx((150 + 100) / 2)
    assert figures["late_p99_ms"] == pytest.approx(500)
    assert (figures["requests"], figures["failures"], figures["seconds"]) == (3, 1, 3.6)
    assert summary([])["hit_ratio"] == 0.0
