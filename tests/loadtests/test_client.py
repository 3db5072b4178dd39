"""Streams as servers send them: tokens alone, in pairs, in halves and not at all; and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from cluster.errors import ConfigError
from loadtests.client import CHAT, COMPLETIONS, Answer, Ask, Client, base, first_model

GAP_S = 0.05
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"usage": {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}}


def event(content: str = "", finish: str | None = None) -> bytes:
    return data({"choices": [{"delta": {"content": content}, "finish_reason": finish}]})


def data(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def refusal(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d no\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


END = data({"choices": [], **USAGE}) + b"data: [DONE]\n\n"


class Server:
    """Answers each connection's first request with these pieces, a gap before each; keeps what it was sent."""

    def __init__(self, pieces: Sequence[bytes], head: bytes = HEAD) -> None:
        self.received = b""
        self.left = threading.Event()  # the client closed before the end
        self._pieces = pieces
        self._head = head
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes one that waits for a connection
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(10)
            try:
                self._answer(connection)
            except OSError:
                self.left.set()

    def _answer(self, connection: socket.socket) -> None:
        while b"\r\n\r\n" not in self.received:
            self.received += connection.recv(65536)
        head, body = self.received.split(b"\r\n\r\n", 1)
        length = int(
            next((line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length" in line), 0)
        )
        while len(body) < length:
            more = connection.recv(65536)
            body, self.received = body + more, self.received + more
        connection.sendall(self._head)
        for piece in self._pieces:
            time.sleep(GAP_S)
            connection.sendall(piece if self._head is not HEAD else b"%x\r\n%s\r\n" % (len(piece), piece))
        if self._pieces and b"[DONE]" in self._pieces[-1]:
            connection.sendall(b"0\r\n\r\n")


@contextmanager
def server(*pieces: bytes, head: bytes = HEAD) -> Iterator[Server]:
    made = Server(pieces, head)
    try:
        yield made
    finally:
        made.close()


def send(url: str, leave_after: int = 0, path: str = CHAT, timeout_s: float = 10.0, **body: object) -> Answer:
    client = Client(url, "m", "secret", {"ignore_eos": True}, timeout_s)
    return client.send(Ask(path, {"max_tokens": 5, **body}, leave_after=leave_after))


def test_each_token_has_its_time_and_counts_are_the_servers() -> None:
    with server(event(), event("a"), event("b"), event("c", "stop"), END) as made:
        answer = send(made.url)
    assert (answer.error, answer.text, answer.left) == ("", "abc", False)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (9, 4, 5)
    assert len(answer.times_s) == 3
    assert answer.ttft_s >= 2 * GAP_S, "the first event held no text"
    assert min(answer.itls_s) > 0, "tokens were seen as they came, not together"
    assert sum(answer.itls_s) >= 1.5 * GAP_S
    assert answer.e2e_s > answer.ttft_s + sum(answer.itls_s)
    assert answer.tpot_s == pytest.approx((answer.e2e_s - answer.ttft_s) / 4)


def test_only_what_openai_knows_is_sent_and_what_was_asked_for() -> None:
    with server(event("a", "stop"), END) as made:
        send(made.url, messages=[])
    head, body = made.received.split(b"\r\n\r\n", 1)
    assert b"authorization: bearer secret" in head.lower()
    assert head.startswith(b"POST /v1/chat/completions ")
    assert json.loads(body) == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        "max_tokens": 5, "messages": [],
    }  # fmt: skip


def test_what_comes_together_has_one_time_and_halves_wait_for_their_end() -> None:
    half = event("bc")
    with server(event("a") + event("b"), half[:20], half[20:], event("d", "stop"), END) as made:
        answer = send(made.url)
    assert answer.text == "abbcd"
    assert len(answer.times_s) == 4
    assert answer.itls_s[0] == 0.0
    assert answer.itls_s[1] >= 1.5 * GAP_S


def test_an_answer_without_text_begins_with_its_end_and_thoughts_are_text() -> None:
    with server(event(), event("", "length"), END) as made:
        silent = send(made.url)
    assert (silent.error, silent.text, len(silent.times_s)) == ("", "", 1)
    thought = data({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    with server(thought, event("a", "stop"), END) as made:
        assert send(made.url).text == "hma"
    with server(data({"choices": [{"text": "x", "finish_reason": "stop"}]}), END) as made:
        assert send(made.url, path=COMPLETIONS).text == "x"


def test_without_usage_tokens_are_not_guessed() -> None:
    with server(event("a"), event("b", "stop"), b"data: [DONE]\n\n") as made:
        answer = send(made.url)
    assert answer.output_tokens == 0
    assert answer.tpot_s is None


@pytest.mark.parametrize(
    ("pieces", "head", "error"),
    [
        ([], refusal(429, b'{"error": {"message": "m", "code": "overloaded"}}'), "429 overloaded"),
        ([], refusal(502, b"bad"), "502 bad"),
        ([event("a"), data({"error": {"message": "broken"}})], HEAD, "broken"),
        ([event("a")], HEAD, "ProtocolError"),
        ([b"data: {\n\n"], HEAD, "the stream is not what OpenAI's API sends"),
        ([b"data: 7\n\n"], HEAD, "the stream is not what OpenAI's API sends"),
        ([END], HEAD, "the stream held nothing"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(pieces: list[bytes], head: bytes, error: str) -> None:
    with server(*pieces, head=head) as made:
        assert send(made.url).error == error


def test_a_server_that_is_gone_or_silent_is_an_error() -> None:
    with server() as made:
        pass
    assert send(made.url).error == "NewConnectionError"
    with server(event("a", "stop"), END) as made:
        assert send(made.url, timeout_s=0.02).error == "ReadTimeoutError"


def test_one_that_drips_for_ever_ends_at_the_timeout() -> None:
    with server(*[event("a")] * 100) as made:
        assert send(made.url, timeout_s=0.3).error == "no end after 0.3 s"


def test_who_leaves_closes_the_connection() -> None:
    with server(*[event("a")] * 100) as made:
        answer = send(made.url, leave_after=2)
        assert made.left.wait(10)
    assert (answer.left, len(answer.times_s), answer.error) == (True, 2, "")


def test_the_first_model_is_found_or_the_error_says_what_to_do() -> None:
    def listing(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body

    with server(head=listing(b'{"data": [{"id": "one"}, {"id": "two"}]}')) as made:
        assert first_model(made.url) == "one"
    with server(head=listing(b'{"data": []}')) as made, pytest.raises(ConfigError, match="--model"):
        first_model(made.url)
    with pytest.raises(ConfigError, match="is it running"):
        first_model(made.url)


def test_addresses_are_taken_with_and_without_v1() -> None:
    assert base("http://h:1/v1/") == base("http://h:1/v1") == base("http://h:1/") == "http://h:1"
