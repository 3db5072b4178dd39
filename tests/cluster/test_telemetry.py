"""Traces on and off: what a process does with the environment it has, and what calls between processes carry."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import telemetry
from cluster.errors import ConfigError, Overloaded
from cluster.messages import Ack
from cluster.rpc import Client, Server
from cluster.telemetry import INVALID_SPAN
from tests.collector import Collector, edges, exporting


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with exporting(monkeypatch) as made:
        yield made


@pytest.mark.parametrize("off", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_unless_traces_are_wanted_nothing_is_made_carried_or_imported(off: dict[str, str]) -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"} if off else {}
    code = (
        "import sys; from cluster import telemetry as t\n"
        "t.check(); t.configure('test')\n"
        "with t.span('a', t.root('r', {'traceparent': '00-' + 32 * '1' + '-' + 16 * '1' + '-01'}, {})) as span:\n"
        "    assert span is t.INVALID_SPAN\n"
        "    assert t.outgoing((('a', 'b'),)) == (('a', 'b'),)\n"
        "assert not [m for m in sys.modules if m.startswith(('opentelemetry.sdk.trace', 'opentelemetry.exporter'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, **endpoint, **off})


def test_a_call_carries_the_span_it_is_made_in(collector: Collector) -> None:
    async def handler(message: Ack, context: Any) -> Ack:
        with telemetry.span("handled", telemetry.caller()):
            return message

    async def body() -> None:
        server = Server("secret", {"Do": handler}, {})
        client = Client(await server.start("127.0.0.1"), "secret")
        await client.call("Do", Ack(), 5)  # in no span: it is nobody's
        with telemetry.span("calling", root):
            await asyncio.create_task(client.call("Do", Ack(), 5))
        await client.close()
        await server.stop()

    root = telemetry.root("root", {}, {})
    asyncio.run(body())
    telemetry.end(root)
    telemetry.close()
    (trace,) = collector.traces()
    assert edges(collector.tree(trace)) == [("calling", "root"), ("handled", "calling"), ("root", "")]


def test_errors_times_and_what_is_not_known(collector: Collector) -> None:
    root = telemetry.root("root", {"traceparent": "rubbish"}, {"known": 1, "unknown": None})
    now = time.monotonic()
    telemetry.record("past", root, now - 7, now - 4)
    with pytest.raises(Overloaded), telemetry.span("refused", root):
        raise Overloaded("no room")
    telemetry.end(root)
    telemetry.end(root, {"late": True}, "late")
    telemetry.close()
    (trace,) = collector.traces()
    past, refused, root_span = sorted(collector.tree(trace), key=lambda span: span.name)
    assert past.ended_ns - past.began_ns == pytest.approx(3e9, abs=1e7)
    assert refused.failed
    assert refused.attributes == {"error.type": "server_overloaded"}
    assert (root_span.attributes, root_span.failed) == ({"known": 1}, False)
    assert telemetry.root("after the end", {}, {}) is INVALID_SPAN


def test_a_collector_that_does_not_answer_holds_no_process_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(telemetry, "FLUSH_S", 0.1)
        telemetry.configure("test")
        telemetry.end(telemetry.root("root", {}, {}))
        telemetry.close()
        assert "last spans" in {thread.name for thread in threading.enumerate()}  # it goes on waiting for the answer


def test_what_cannot_be_exported_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="4318"):
        telemetry.check()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    telemetry.check()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="tandem-serve\\[tracing\\]"):
        telemetry.check()
    telemetry.configure("test")
    assert telemetry.root("off", {}, {}) is INVALID_SPAN
