"""OpenTelemetry traces across all hops; nothing at all unless an exporter is configured.

Requests are multiplexed over long streams, so their context travels as a `traceparent` field
(W3C Trace Context), not as call metadata.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # a bare compute host
    trace = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

Value = str | int | float | bool | tuple[str, ...]
Attributes = Mapping[str, Value]
_tracer: Any = None
_provider: Any = None


def setup(service: str, otlp_endpoint: str, trace_file: str) -> None:
    """Exports the process's spans to an OTLP collector, a JSON-lines file, both or nowhere."""
    global _tracer, _provider
    if trace is None or not (otlp_endpoint or trace_file):
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _provider = TracerProvider(resource=Resource.create({"service.name": service}))
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint)))
    if trace_file:
        exporter: Any = FileExporter(Path(trace_file), service)
        _provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=200))
    _tracer = _provider.get_tracer("infermesh")


def shutdown() -> None:
    """Sends what is buffered."""
    if _provider is not None:
        _provider.shutdown()


class FileExporter:
    """Appends each finished span to a file as one JSON line; several processes may share it."""

    def __init__(self, path: Path, service: str) -> None:
        self._path = path
        self._service = service
        self._lock = threading.Lock()

    def export(self, spans: "Sequence[ReadableSpan]") -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        lines = "".join(self._line(span) for span in spans)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(lines)  # one write: O_APPEND keeps other processes' lines whole
        return SpanExportResult.SUCCESS

    def _line(self, span: "ReadableSpan") -> str:
        context = span.get_span_context()
        assert context is not None
        fields = {
            "service": self._service,
            "name": span.name,
            "trace_id": f"{context.trace_id:032x}",
            "span_id": f"{context.span_id:016x}",
            "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
            "start_ns": span.start_time,
            "end_ns": span.end_time,
            "attributes": dict(span.attributes or {}),
        }
        return json.dumps(fields, default=str) + "\n"

    def shutdown(self) -> None: ...

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


def _context(traceparent: str | None) -> Any:
    if not traceparent:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


@contextmanager
def span(
    name: str,
    *,
    traceparent: str | None = None,
    attributes: Attributes | None = None,
    serves: bool = False,
) -> Iterator[Any]:
    """A span around the block, child of `traceparent` or of the current span; yields it or None.

    Args:
        serves: a request of somebody else is answered in it.
    """
    if _tracer is None:
        yield None
        return
    with _tracer.start_as_current_span(
        name,
        context=_context(traceparent),
        kind=trace.SpanKind.SERVER if serves else trace.SpanKind.INTERNAL,
        attributes=dict(attributes or {}),
    ) as current:
        yield current


def describe(name: str, attributes: Attributes) -> None:
    """What is known at its end of the current span's work; nothing where it is over."""
    if _tracer is None:
        return
    current = trace.get_current_span()
    if current.is_recording():
        current.update_name(name)
        current.set_attributes(dict(attributes))


def trace_id(traceparent: str = "") -> str:
    """Of `traceparent` or of the current span, as 32 hexadecimal digits; empty where nothing is
    traced."""
    if _tracer is None:
        return ""
    context = trace.get_current_span(_context(traceparent)).get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def as_metadata() -> tuple[tuple[str, str], ...]:
    """The current span for a unary gRPC call; read again with `of_call`."""
    traceparent = current_traceparent()
    return (("traceparent", traceparent),) if traceparent else ()


def of_call(context: Any) -> str | None:
    """The traceparent in a gRPC call's metadata; None where there is none."""
    if _tracer is None:
        return None
    return next(
        (str(v) for k, v in context.invocation_metadata() or () if k == "traceparent"), None
    )


def current_traceparent() -> str:
    """The current span as a W3C traceparent; empty where nothing is traced."""
    if _tracer is None:
        return ""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def record_span(
    name: str,
    start_ns: int,
    end_ns: int,
    traceparent: str,
    attributes: Attributes | None = None,
) -> None:
    """A span of work done elsewhere, from wall-clock nanoseconds; dropped without a parent."""
    if _tracer is None or not traceparent:
        return
    done = _tracer.start_span(
        name,
        context=_context(traceparent),
        start_time=start_ns,
        attributes=dict(attributes or {}),
    )
    done.end(end_time=end_ns)
