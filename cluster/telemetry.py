"""OpenTelemetry traces: how any process of a deployment makes spans, and how one tree of them crosses processes.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set: then the SDK is not imported, no
span is made and nothing is added to a call. How much is sampled, where it goes and in which batches is for the SDK's
own variables to say. Between processes the span at hand travels as W3C `traceparent` (https://www.w3.org/TR/trace-context/),
from clients in a header of HTTP, between ours in the metadata of gRPC calls.

Which spans there are is for `router/tracing.py`, `workers/tracing.py` and the stores to say. Times are monotonic
seconds. Nothing here may be given text, tokens or keys: attributes are ids, counts and reasons.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.errors import ConfigError, TandemError

__all__ = ["INVALID_SPAN", "Attributes", "Span", "SpanKind"]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
OFF = {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none"}
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")  # the first that is set counts
PROTOCOL = "http/protobuf"
FLUSH_S = 2.0  # for the last spans of a process that ends
Attributes = Mapping[str, object]  # strings, numbers, truths, lists of strings; what is None is left out

_PROPAGATOR = TraceContextTextMapPropagator()
_tracer: Tracer | None = None  # None: off
_provider: Any = None
log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- on or off
def wanted() -> bool:
    """Whether this process's environment asks for traces."""
    asked = any(os.environ.get(name) for name in ENDPOINTS)
    return asked and not any(os.environ.get(name, "").lower() == value for name, value in OFF.items())


def check() -> None:
    """Raises ConfigError when traces are asked for that cannot be exported from here."""
    if not wanted():
        return
    asked = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), PROTOCOL)
    if asked != PROTOCOL:
        raise ConfigError(
            f"traces are exported over {PROTOCOL}, not {asked!r}; unset {PROTOCOLS[1]} and give the collector's HTTP"
            f" port, by default 4318, in {ENDPOINTS[0]}"
        )
    try:
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError:
        raise ConfigError(
            f"{ENDPOINTS[0]} is set, but its exporter is not installed; pip install 'tandem-serve[tracing]' or unset it"
        ) from None


def configure(part: str, instance: str = "") -> None:
    """From now on this process makes spans, if that is wanted; `part` is what it is of a deployment, `instance` which.

    Once per process. A process that cannot export says so in its log and goes on without.
    """
    global _tracer, _provider
    if _tracer is not None or not wanted():
        return
    try:
        check()
    except ConfigError as error:
        log.error("no traces from here: %s", error.message)
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or f"tandem-{part}"
    resource = Resource.create({"service.name": name, "service.instance.id": instance or f"{part}-{os.getpid()}"})
    # not the global one, which is Ray's or the operator's to set; its atexit handler could hold an exit up for long
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("tandem")


def close() -> None:
    """Export what there is, but do not wait long for a collector that does not answer. No span is made after it."""
    global _tracer, _provider
    provider, _tracer, _provider = _provider, None, None
    if provider is not None:
        thread = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
        thread.start()
        thread.join(FLUSH_S)


# ----------------------------------------------------------------------------------------------------------- spans
def root(name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
    """The span of what a client asked for, under the client's own if it sent one. Sampled or not: see its context."""
    if _tracer is None:
        return INVALID_SPAN
    parent = _PROPAGATOR.extract(headers, context.Context())
    return _tracer.start_span(name, parent, SpanKind.SERVER, _known(attributes))


def start(
    name: str,
    parent: Span,
    attributes: Attributes | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    at_s: float | None = None,
) -> Span:
    """A span under `parent`, from now or `at_s` on; `end` it. One of what is not traced records nothing."""
    if _tracer is None or not parent.get_span_context().trace_flags.sampled:
        return INVALID_SPAN
    above = trace.set_span_in_context(parent, context.Context())
    began = None if at_s is None else _wall_ns(at_s)
    return _tracer.start_span(name, above, kind, _known(attributes or {}), start_time=began)


def end(span: Span, attributes: Attributes | None = None, error: str = "", at_s: float | None = None) -> None:
    """`error`: the code of what went wrong. A span that has ended stays as it is."""
    if not span.is_recording():
        return
    span.set_attributes(_known(attributes or {}))
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(None if at_s is None else _wall_ns(at_s))


def record(name: str, parent: Span, began_s: float, ended_s: float, attributes: Attributes | None = None) -> None:
    """A span of what is over already."""
    end(start(name, parent, attributes, at_s=began_s), at_s=ended_s)


@contextmanager
def span(
    name: str, parent: Span, attributes: Attributes | None = None, kind: SpanKind = SpanKind.INTERNAL
) -> Iterator[Span]:
    """A span for as long as the block takes, and the current one in it. What the block raises is its error."""
    made = start(name, parent, attributes, kind)
    if made is INVALID_SPAN:
        yield made
        return
    try:
        with current(made):
            yield made
    except BaseException as error:
        end(made, error=code(error))
        raise
    end(made)


def code(error: BaseException) -> str:
    """What `end` calls it."""
    return error.code if isinstance(error, TandemError) else type(error).__name__


# ------------------------------------------------------------------------------------------------ between processes
def current(span: Span) -> AbstractContextManager[Span]:
    """Calls to other processes that are made inside carry it, also those of tasks that are created inside."""
    if not span.is_recording():
        return nullcontext(span)
    return trace.use_span(span, record_exception=False, set_status_on_exception=False)


def caller() -> Span:
    """The current span; in the handler of a call, its caller's."""
    return trace.get_current_span() if _tracer is not None else INVALID_SPAN


def outgoing(metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """A call's metadata, with the current span where there is one that is traced."""
    if _tracer is None or not trace.get_current_span().get_span_context().trace_flags.sampled:
        return metadata
    carried: dict[str, str] = {}
    _PROPAGATOR.inject(carried)
    return (*metadata, *carried.items())


def incoming(metadata: Mapping[str, str]) -> None:
    """In the task of a call's handler, which is its own: from now on the caller's span is the current one."""
    if _tracer is not None:
        context.attach(_PROPAGATOR.extract(metadata, context.Context()))


def _known(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _wall_ns(at_s: float) -> int:
    """A span is dated by the wall clock, for people and collectors; nothing is decided by it."""
    return time.time_ns() - int(1e9 * (time.monotonic() - at_s))
