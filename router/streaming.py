"""Responses that end when the client leaves: work raced against `http.disconnect`, and server-sent events.

Leaving is an event like another: the race cancels the work, the work's `finally` blocks tell the workers. A stream's
first frame is awaited before the status line is sent, so that whatever fails before the first token gets a proper
status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import TandemError
from router.http_errors import stream_end

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would buffer otherwise

T = TypeVar("T")

log = logging.getLogger(__name__)


class ClientLeft(Exception):
    """Nobody is there to answer."""


async def until_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; when the client disconnects first, `work` is cancelled and ClientLeft raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from `frames`, which must end with their own last frame. `late_headers` are asked for when the
    first one has come."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        late_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        super().__init__(headers={**SSE_HEADERS, **headers})
        del self.headers["content-length"]
        self._frames = frames
        self._late_headers = late_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_client_leaves(receive, self._send(send))
        except ClientLeft:
            log.info("a client left its stream")

    async def _send(self, send: Send) -> None:
        started = False
        async with aclosing(self._frames) as frames:
            try:
                async for frame in frames:
                    if not started:
                        self.headers.update(self._late_headers())
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            except OSError:  # what servers raise from `send` when the connection is gone
                raise ClientLeft from None
            except Exception as error:  # once begun, a stream can only tell its reader in a frame
                if not started:
                    raise
                if not isinstance(error, TandemError):
                    log.exception("a stream failed")
                await send({"type": "http.response.body", "body": stream_end(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
