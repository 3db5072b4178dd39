"""One streamed request to an OpenAI-compatible server, and when each piece of its answer came.

Only fields that OpenAI's API has are sent, plus what the caller adds, so that any server can be measured. Bytes are
taken as they come (urllib3's chunks): Locust's FastHttpUser waits for 1,024 of them and so misses the first token.
Tokens are what the server's `usage` says: counting them here would cost the time that is being measured. Nothing is
retried, and what goes wrong is in the answer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import urllib3

from cluster.errors import ConfigError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONNECT_S = 10.0
MODELS_S = 10.0  # for the list of models
CONNECTIONS = 4096  # kept open for the next request
SHOWN = 200  # characters of an error's text
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a user asks. `think_s` passes before it is sent; after `leave_after` pieces of text (0: never) the user
    goes away without waiting for the rest."""

    path: str
    body: dict[str, Any]
    think_s: float = 0.0
    leave_after: int = 0


@dataclass(slots=True)
class Answer:
    """What came of it. Times are seconds of the monotonic clock."""

    sent_s: float
    ended_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # of the chunks that held text
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0  # 0: the server sent no usage
    error: str = ""
    left: bool = False  # the user went away

    @property
    def ttft_s(self) -> float:
        """To the first text. Raises IndexError when none came."""
        return self.times_s[0] - self.sent_s

    @property
    def itls_s(self) -> list[float]:
        """The gaps between chunks; a chunk may hold several tokens."""
        return [later - before for before, later in itertools.pairwise(self.times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None where that is not known."""
        if self.output_tokens < 2 or not self.times_s:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s


class Client:
    """Sends requests to one server; safe to use from many greenlets or threads at once."""

    def __init__(
        self, url: str, model: str, key: str = "", extra: dict[str, Any] | None = None, timeout_s: float = 600.0
    ) -> None:
        """`extra` fields go into every body; `timeout_s` is the longest life of a request."""
        self._url = base(url)
        self._timeout_s = timeout_s
        self._common = {"model": model, "stream": True, "stream_options": {"include_usage": True}} | (extra or {})
        self._headers = headers(key) | {"content-type": "application/json"}
        self._pool = urllib3.PoolManager(maxsize=CONNECTIONS, retries=False)

    def encode(self, ask: Ask) -> bytes:
        """The request's body; apart from `send` so that a replay can have it ready before its time."""
        return orjson.dumps(self._common | ask.body)

    def send(self, ask: Ask, body: bytes | None = None) -> Answer:
        """Wait for the whole answer. Raises nothing of the network's: see `Answer.error`."""
        body = body if body is not None else self.encode(ask)
        answer = Answer(time.perf_counter())
        try:
            timeout = urllib3.Timeout(connect=CONNECT_S, read=self._timeout_s)
            response = self._pool.request(
                "POST", self._url + ask.path, body=body, headers=self._headers, timeout=timeout, preload_content=False
            )
            try:
                self._read(response, answer, ask.leave_after)
            finally:
                # a connection with an answer left in it is of no use to the next request
                response.release_conn() if not answer.left and not answer.error else response.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            answer.error = type(error).__name__
        except (ValueError, TypeError, AttributeError):
            answer.error = "the stream is not what OpenAI's API sends"
        answer.ended_s = time.perf_counter()
        if not (answer.error or answer.left or answer.times_s):
            answer.error = "the stream held nothing"
        return answer

    def _read(self, response: urllib3.BaseHTTPResponse, answer: Answer, leave_after: int) -> None:
        if response.status != 200:
            answer.error = f"{response.status} {_message(response.read(SHOWN * 10))}"
            return
        for now_s, data in _events(response):
            if data == DONE:
                continue  # to the end of the response, so that its connection can be used again
            _take(orjson.loads(data), answer, now_s)
            if answer.error:
                return
            if now_s - answer.sent_s > self._timeout_s:
                answer.error = f"no end after {self._timeout_s:g} s"
                return
            if leave_after and len(answer.times_s) >= leave_after:
                answer.left = True
                return


def _events(response: urllib3.BaseHTTPResponse) -> Iterator[tuple[float, bytes]]:
    """(when it came, what follows `data:`) of each line of a stream; lines that came together have one time."""
    pending = b""
    while piece := response.read1():  # whatever has come; waits while there is nothing
        now_s = time.perf_counter()
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now_s, line[5:].strip()


def _take(event: dict[str, Any], answer: Answer, now_s: float) -> None:
    if error := event.get("error"):
        answer.error = str(error.get("message", error) if isinstance(error, dict) else error)[:SHOWN]
        return
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if text:
            answer.text += text
        # an answer of tokens that make no text ends without any: then its end is the first that a user sees of it
        if text or (choice.get("finish_reason") and not answer.times_s):
            answer.times_s.append(now_s)
    if usage := event.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens") or 0
        answer.output_tokens = usage.get("completion_tokens") or 0
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _message(body: bytes) -> str:
    """The code of an error in OpenAI's shape, which is the same for equal causes, or else the beginning of the text."""
    try:
        error = orjson.loads(body)["error"]
        return str(error.get("code") or error.get("message") or error)[:SHOWN]
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:SHOWN].decode(errors="replace")


def base(url: str) -> str:
    """The server's address without the /v1 that OpenAI's clients are given."""
    return url.rstrip("/").removesuffix("/v1")


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def first_model(url: str, key: str = "") -> str:
    """The name of the first model that the server lists. Raises ConfigError."""
    try:
        answer = urllib3.request("GET", base(url) + "/v1/models", headers=headers(key), timeout=MODELS_S, retries=False)
        return str(answer.json()["data"][0]["id"])
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ConfigError(f"no server answers at {base(url)} ({type(error).__name__}); is it running?") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{base(url)}/v1/models lists no model (status {answer.status}); give its name with --model, and the "
            f"key in OPENAI_API_KEY where one is asked for"
        ) from error
