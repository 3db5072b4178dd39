"""What happens to every HTTP request before a route sees it, as plain ASGI: an id, the key, the size of the body.

Pure ASGI because wrappers that buffer or re-task responses break streaming and cancellation. Each layer is one class
with one job; the order (id, then key, then size) is `router/app.py`'s.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BodyTooLarge, Unauthorized
from router.http_errors import response

MAX_REQUEST_ID = 128
OPERATOR_HEADER = "x-tandem-operator-key"
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]")


class RequestId:
    """Puts `request_id` into the request's state and on its response: the client's own, made harmless, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _NOT_IN_ID.sub("", Headers(scope=scope).get("x-request-id", ""))[:MAX_REQUEST_ID]
        request_id = given or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Bearer:
    """Which of some keys an `Authorization` header carries, found in a time that tells nothing about them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def match(self, header: str) -> bytes | None:
        """The key's digest, or None."""
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        found = None
        for known in self._digests:  # every key is compared, so that time tells nothing
            if hmac.compare_digest(digest, known) and scheme.lower() == "bearer":
                found = known
        return found


class ApiKeys:
    """Asks for a bearer key under /v1 and puts the `tenant` into the state: the key's digest, or empty. `operator` says
    whether the request may do what is not for tenants: with the operator's key in a header of its own, because the
    bearer key says whose request it is; without any keys, always."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], operator_key: str = "") -> None:
        self._app = app
        self._keys = Bearer(keys)
        self._operator = Bearer([operator_key] if operator_key else [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = ""
            headers = Headers(scope=scope)
            if self._keys and (scope["path"] == "/v1" or scope["path"].startswith("/v1/")):
                digest = self._keys.match(headers.get("authorization", ""))
                if digest is None:
                    error = Unauthorized("send a valid API key as `Authorization: Bearer KEY`")
                    await response(error)(scope, receive, send)
                    return
                tenant = digest.hex()
            operator = not self._keys or self._operator.match(f"Bearer {headers.get(OPERATOR_HEADER, '')}") is not None
            scope.setdefault("state", {}).update(tenant=tenant, operator=operator)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses larger bodies before anything parses them: by their declared length, else while they arrive."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        too_large = BodyTooLarge(f"the body is larger than this server's limit of {self._limit} bytes")
        if len(declared) > len(str(self._limit)) or (declared.isdecimal() and int(declared) > self._limit):
            await response(too_large)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise too_large
            return message

        await self._app(scope, counted, send)
