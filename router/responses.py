"""What clients get back: OpenAI's response bodies and stream chunks, as bytes.

A chunk differs from the next only in its text, so everything before and after the text is built once per request and
choice. Every chunk carries `finish_reason` (null until the last) because clients break without it; `usage` comes as
one extra chunk, and only when asked for, because many clients index choices[0].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from cluster.messages import FinishReason

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt tokens, those whose KV was found

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Head:
    """What all bodies of one response have in common."""

    id: str
    created: int  # seconds since the epoch
    model: str

    def body(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


@dataclass(frozen=True, slots=True)
class Whole:
    """A choice that has ended."""

    text: str
    finish: FinishReason | None
    tokens: Sequence[int] | None  # None: not asked for


class Format(Protocol):
    """One endpoint's way to write choices: whole, or as chunks."""

    def whole(self, choices: Iterable[Whole], usage: Usage) -> bytes:
        """The body of a response that is not streamed; choices in the order of their index."""
        ...

    def opening(self, index: int) -> bytes:
        """What comes before a choice's first text."""
        ...

    def text(self, index: int, text: str, tokens: Sequence[int] | None) -> bytes: ...

    def finish(self, index: int, reason: FinishReason) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class ChatFormat:
    """Bodies of /v1/chat/completions."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._start = orjson.dumps(head.body("chat.completion.chunk"))[:-1]  # without the closing brace

    def whole(self, choices: Iterable[Whole], usage: Usage) -> bytes:
        bodies = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish,
            }
            | _token_ids(choice)
            for index, choice in enumerate(choices)
        ]
        return orjson.dumps(self._head.body("chat.completion", choices=bodies, usage=usage.body()))

    def opening(self, index: int) -> bytes:
        return self._chunk(index, b'{"role":"assistant","content":""}', b"null")

    def text(self, index: int, text: str, tokens: Sequence[int] | None) -> bytes:
        return self._chunk(index, b'{"content":%b}' % orjson.dumps(text), b"null", tokens)

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return self._chunk(index, b"{}", orjson.dumps(reason))

    def usage(self, usage: Usage) -> bytes:
        return event(self._head.body("chat.completion.chunk", choices=[], usage=usage.body()))

    def _chunk(self, index: int, delta: bytes, finish: bytes, tokens: Sequence[int] | None = None) -> bytes:
        return b'data: %b,"choices":[{"index":%d,"delta":%b,"logprobs":null,"finish_reason":%b%b}]}\n\n' % (
            self._start, index, delta, finish, _token_field(tokens),
        )  # fmt: skip


class CompletionFormat:
    """Bodies of /v1/completions."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._start = orjson.dumps(head.body("text_completion"))[:-1]

    def whole(self, choices: Iterable[Whole], usage: Usage) -> bytes:
        bodies = [
            {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish} | _token_ids(choice)
            for index, choice in enumerate(choices)
        ]
        return orjson.dumps(self._head.body("text_completion", choices=bodies, usage=usage.body()))

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str, tokens: Sequence[int] | None) -> bytes:
        return self._chunk(index, orjson.dumps(text), b"null", tokens)

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return self._chunk(index, b'""', orjson.dumps(reason))

    def usage(self, usage: Usage) -> bytes:
        return event(self._head.body("text_completion", choices=[], usage=usage.body()))

    def _chunk(self, index: int, text: bytes, finish: bytes, tokens: Sequence[int] | None = None) -> bytes:
        return b'data: %b,"choices":[{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b%b}]}\n\n' % (
            self._start, index, text, finish, _token_field(tokens),
        )  # fmt: skip


def _token_ids(choice: Whole) -> dict[str, Any]:
    return {} if choice.tokens is None else {"token_ids": choice.tokens}


def _token_field(tokens: Sequence[int] | None) -> bytes:
    return b"" if tokens is None else b',"token_ids":%b' % orjson.dumps(list(tokens))
