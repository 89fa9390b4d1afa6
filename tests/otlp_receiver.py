"""An OTLP collector that keeps what it is sent: the real protocol, in this process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


class OtlpReceiver(trace_grpc.TraceServiceServicer, metrics_grpc.MetricsServiceServicer):
    """Listens on a free port of this machine; a context manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, Any]] = []
        self._metrics: dict[str, dict[str, Any]] = {}
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_grpc.add_TraceServiceServicer_to_server(self, self._server)
        metrics_grpc.add_MetricsServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop(1).wait()

    def spans(self, trace_id: str) -> list[tuple[str, Any]]:
        """Service and span of all of one trace that came so far."""
        wanted = bytes.fromhex(trace_id)
        with self._lock:
            return [(service, span) for service, span in self._spans if span.trace_id == wanted]

    def metrics(self, service: str) -> dict[str, Any]:
        """The metrics that a service sent last, by name."""
        with self._lock:
            return dict(self._metrics.get(service, {}))

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # both services' name
        del context
        with self._lock:
            if isinstance(request, trace_pb.ExportTraceServiceRequest):
                for resource in request.resource_spans:
                    service = str(attributes(resource.resource.attributes)["service.name"])
                    for scope in resource.scope_spans:
                        self._spans += [(service, span) for span in scope.spans]
                return trace_pb.ExportTraceServiceResponse()
            for resource in request.resource_metrics:
                service = str(attributes(resource.resource.attributes)["service.name"])
                found = [metric for scope in resource.scope_metrics for metric in scope.metrics]
                self._metrics[service] = {metric.name: metric for metric in found}
            return metrics_pb.ExportMetricsServiceResponse()


def attributes(pairs: "list[KeyValue]") -> dict[str, Any]:
    """Attributes as Python has them."""
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)
