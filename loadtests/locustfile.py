"""Locust users that stream from any OpenAI-compatible server and report TTFT, time between tokens and whole requests.

    locust -f loadtests/locustfile.py --headless -u 8 -t 30s --host http://127.0.0.1:8000

A plain requests session reads the stream: Locust's FastHttpUser waits for 1,024 bytes and so misses the first token.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

from locust import User, between, events, task
from requests import Response, Session

WORDS = ("time", "people", "way", "water", "word", "day", "part", "number", "sound", "work", "place", "year", "back")
PROMPT_WORDS = (8, 400)
NEW_TOKENS = (8, 64)
TIMEOUT_S = 120


class ChatUser(User):
    """Asks something new, waits a moment, asks again."""

    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        self.session = Session()

    @task
    def chat(self) -> None:
        question = " ".join(random.choices(WORDS, k=random.randint(*PROMPT_WORDS)))
        body: Any = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": random.randint(*NEW_TOKENS),
            "ignore_eos": True,
            "stream": True,
        }
        start = previous = time.perf_counter()
        error: Exception | None = None
        count = 0
        try:
            url = f"{self.host}/v1/chat/completions"
            with self.session.post(url, json=body, stream=True, timeout=TIMEOUT_S) as response:
                response.raise_for_status()
                for _ in _contents(response):
                    now = time.perf_counter()
                    _report("TTFT" if count == 0 else "ITL", now - previous)
                    previous, count = now, count + 1
            if count == 0:
                raise ValueError("the stream held no text")
        except (OSError, ValueError) as failure:  # requests' exceptions are OSErrors
            error = failure
        _report("request", time.perf_counter() - start, error)


def _contents(response: Response) -> Iterator[str]:
    for line in response.iter_lines(chunk_size=1):
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        chunk: dict[str, Any] = json.loads(line[6:])
        if "error" in chunk:
            raise ValueError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]


def _report(name: str, seconds: float, error: Exception | None = None) -> None:
    events.request.fire(
        request_type="chat", name=name, response_time=seconds * 1000, response_length=0, exception=error, context={}
    )
