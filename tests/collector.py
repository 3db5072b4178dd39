"""A collector of traces for tests: an HTTP server that keeps the spans it is sent over OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from cluster import telemetry


@dataclass(frozen=True)
class Seen:
    """A span. Ids in hex; `parent` is empty for a root, `process` the service.instance.id of who made it."""

    trace: str
    id: str
    parent: str
    name: str
    process: str
    attributes: dict[str, Any]
    failed: bool
    began_ns: int
    ended_ns: int


class Collector:
    """`url` is for OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self) -> None:
        self.received = b""  # every body, for what must not be in there
        self._spans: list[Seen] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                collector._take(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Of a process that is to send its spans here, soon after they have ended."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}

    def tree(self, trace: str) -> list[Seen]:
        """What came of that trace so far."""
        return [span for span in list(self._spans) if span.trace == trace]

    def traces(self) -> set[str]:
        return {span.trace for span in list(self._spans)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes) -> None:
        self.received += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {item.key: _value(item.value) for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    seen = Seen(
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        name=span.name,
                        process=about["service.instance.id"],
                        attributes={item.key: _value(item.value) for item in span.attributes},
                        failed=span.status.code == Status.STATUS_CODE_ERROR,
                        began_ns=span.start_time_unix_nano,
                        ended_ns=span.end_time_unix_nano,
                    )
                    self._spans.append(seen)


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    found = getattr(value, kind)
    return [_value(item) for item in found.values] if kind == "array_value" else found


def edges(tree: list[Seen]) -> list[tuple[str, str]]:
    """(name of a span, name of the one above it), sorted; of a root, or of one whose parent did not come, ''."""
    names = {span.id: span.name for span in tree}
    return sorted((span.name, names.get(span.parent, "")) for span in tree)


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


@contextmanager
def exporting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """This process makes spans, and exports them when `telemetry.close` is called."""
    with collecting() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        telemetry.configure("test", "here")
        try:
            yield made
        finally:
            telemetry.close()
