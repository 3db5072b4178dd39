"""The only place where errors become HTTP: OpenAI's error shape, always, and Retry-After where a retry is sound.

Clients decide by status and code whether to retry, so a client's mistake must never look like a server's. A message
never echoes more than MAX_ECHO characters of what was sent, and what is not a TandemError says nothing of our
insides.
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import InvalidRequest, TandemError, Unauthorized
from router.metrics import Metrics
from router.responses import DONE, event

MAX_ECHO = 200
RETRY_AFTER_S = 2.0  # for retriable errors that give no estimate of their own
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")

INTERNAL = TandemError("internal error; the x-request-id of this response finds it in the router's log")

log = logging.getLogger(__name__)


def code(error: Exception) -> str:
    return error.code if isinstance(error, TandemError) else TandemError.code


def body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object for any exception."""
    known = error if isinstance(error, TandemError) and error.status != 500 else INTERNAL
    fields = {"message": known.message, "type": known.type, "param": known.param, "code": known.code}
    return {"error": fields}


def response(error: Exception) -> Response:
    headers: dict[str, str] = {}
    status = error.status if isinstance(error, TandemError) else 500
    if isinstance(error, TandemError) and error.retriable:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s or RETRY_AFTER_S)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(body(error)), status, headers, "application/json")


def stream_end(error: Exception) -> bytes:
    """What ends a stream that fails after it began: the error as an event, then the usual last frame."""
    return event(body(error)) + DONE


def install(app: FastAPI, metrics: Metrics) -> None:
    """Make `app` answer every error through this file."""

    def counted(request: Request, error: Exception) -> Response:
        if request.url.path in GENERATION_PATHS:
            metrics.ended(code(error))
        answer = response(error)
        if answer.status_code >= 500:
            fields = {"request_id": request.state.request_id, "outcome": code(error)}
            log.error("request %s failed: %r", request.state.request_id, error, extra={"fields": fields})
        return answer

    async def tandem_error(request: Request, error: Exception) -> Response:
        return counted(request, error)

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return counted(request, _from_validation(request, error))

    async def http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _from_http(request, error)

    async def bug(request: Request, error: Exception) -> Response:
        answer = counted(request, error)
        answer.headers["x-request-id"] = request.state.request_id
        return answer

    app.add_exception_handler(TandemError, tandem_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_exception)
    app.add_exception_handler(Exception, bug)  # starlette raises it again afterwards, so that it is logged


def _from_validation(request: Request, error: RequestValidationError) -> InvalidRequest:
    """The first thing that is wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return InvalidRequest(f"the body is not valid JSON: {reason}"[:MAX_ECHO], param=None)
    if "json" not in request.headers.get("content-type", ""):
        return InvalidRequest("send the body as JSON, with Content-Type: application/json")
    path = ".".join(str(part) for part in first["loc"][1:])[:MAX_ECHO]
    if not path:
        return InvalidRequest("the body must be a JSON object with the fields of this endpoint")
    return InvalidRequest(f"{path}: {first['msg']}"[: 2 * MAX_ECHO], param=path)


def _from_http(request: Request, error: HTTPException) -> Response:
    """Unknown routes, wrong methods, unreadable bodies."""
    if isinstance(error.__cause__, TandemError):  # raised while FastAPI read the body, as by the body limit
        return response(error.__cause__)
    path = request.url.path[:MAX_ECHO]
    messages = {404: f"there is no {path}; see /docs", 405: f"{path} does not answer {request.method}; see /docs"}
    known = InvalidRequest(messages.get(error.status_code, str(error.detail)[:MAX_ECHO]))
    answer = response(known)
    answer.status_code = error.status_code
    answer.headers.update(error.headers or {})
    return answer
