"""A server that is not Tandem: it knows OpenAI's fields and refuses every other, and counts what it was asked."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "peer-1"
CHAT_FIELDS = {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
COMPLETION_FIELDS = CHAT_FIELDS - {"messages"} | {"prompt"}


@dataclass
class Peer:
    """`first_s` to the first token, `token_s` to each further one."""

    first_s: float = 0.01
    token_s: float = 0.002
    bodies: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0  # answers whose end was sent
    url: str = ""

    async def models(self, received: Request) -> Response:
        return JSONResponse({"data": [{"id": MODEL}]})

    async def answer(self, received: Request) -> Response:
        body = await received.json()
        self.bodies.append(body)
        known = CHAT_FIELDS if received.url.path.endswith("/chat/completions") else COMPLETION_FIELDS
        if body.keys() - known:
            return JSONResponse({"error": {"message": "no such field", "code": "unknown_field"}}, 400)
        if body["model"] != MODEL:
            return JSONResponse({"error": {"message": "no such model", "code": "model_not_found"}}, 404)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        new = body["max_tokens"]
        await asyncio.sleep(self.first_s)
        for number in range(new):
            choice = {"delta": {"content": "x "}} if "messages" in body else {"text": "x "}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(self.token_s if number < new - 1 else 0)
        usage = {"prompt_tokens": 7, "completion_tokens": new}
        self.finished += 1
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


@contextmanager
def serving(**speed: float) -> Iterator[Peer]:
    peer = Peer(**speed)
    routes = [
        Route("/v1/models", peer.models),
        Route("/v1/chat/completions", peer.answer, methods=["POST"]),
        Route("/v1/completions", peer.answer, methods=["POST"]),
    ]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    peer.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        yield peer
    finally:
        server.should_exit = True
        thread.join(20)
