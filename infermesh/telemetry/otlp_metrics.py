"""The process's metrics to an OTLP collector, beside the endpoint that Prometheus scrapes.

Reads the one registry that both show, every few seconds in a thread of its own; nothing at all
where no collector is named. Counters go without `_total`, which collectors add.
"""

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from infermesh.telemetry import metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.samples import Sample

_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}
# What an exporter that finds no collector may hold an ending process up.
_PATIENCE_S = 2.0
_STARTED_NS = time.time_ns()


class Exporter:
    """Sends until it is stopped, and once more then.

    Args:
        exporter: OpenTelemetry's, which knows the protocol.
        interval_s: between two exports.
    """

    def __init__(self, service: str, version: str, exporter: Any, interval_s: float) -> None:
        self._facts = {"service.name": service, "service.version": version}
        self._exporter = exporter
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sends what there is at the end."""
        self._stopping.set()
        self._thread.join(2 * _PATIENCE_S)
        self._exporter.shutdown()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopping.wait(self._interval_s)
            self._exporter.export(snapshot(self._facts))


def start(service: str, version: str, endpoint: str, interval_s: float) -> Exporter | None:
    """Exports to `endpoint`; None where there is none, or a library is missing."""
    if not endpoint or not interval_s:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    except ImportError:  # a bare compute host
        return None
    exporter = OTLPMetricExporter(endpoint=endpoint, timeout=_PATIENCE_S)
    return Exporter(service, version, exporter, interval_s)


def snapshot(facts: dict[str, str]) -> "MetricsData":
    """Everything in the registry, as OpenTelemetry has it; `facts` say whose it is."""
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    now_ns = time.time_ns()
    found = [
        metric for family in metrics.families() if (metric := _metric(family, now_ns)) is not None
    ]
    scope = ScopeMetrics(InstrumentationScope("infermesh"), found, "")
    return MetricsData([ResourceMetrics(Resource.create(facts), [scope], "")])


def _metric(family: "Family", now_ns: int) -> Any:
    """None for what OpenTelemetry has no kind for."""
    from opentelemetry.sdk.metrics import export as otel

    cumulative = otel.AggregationTemporality.CUMULATIVE
    data: Any
    if family.type == "counter":
        samples = [s for s in family.samples if s.name.endswith("_total")]
        data = otel.Sum(_points(samples, now_ns), cumulative, is_monotonic=True)
    elif family.type == "histogram":
        data = otel.Histogram(list(_distributions(family.samples, now_ns)), cumulative)
    elif family.type in ("gauge", "unknown"):
        data = otel.Gauge(_points(family.samples, now_ns))
    else:
        return None
    unit = _UNITS.get(family.name.rpartition("_")[2], "")
    return otel.Metric(family.name, family.documentation, unit, data)


def _points(samples: "list[Sample]", now_ns: int) -> list[Any]:
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    return [NumberDataPoint(s.labels, _STARTED_NS, now_ns, s.value) for s in samples]


def _distributions(samples: "list[Sample]", now_ns: int) -> Iterator[Any]:
    """One point per set of labels; Prometheus' buckets add up, OpenTelemetry's do not."""
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    sums = [s for s in samples if s.name.endswith("_sum")]
    for total in sums:
        labels = total.labels
        below = {
            float(s.labels["le"]): s.value
            for s in samples
            if s.name.endswith("_bucket") and labels.items() <= s.labels.items()
        }
        bounds = sorted(below)
        counts = [int(below[bound]) for bound in bounds]
        apart = [now - before for now, before in zip(counts, [0, *counts], strict=False)]
        # the last bound is infinity, which has no name there
        yield HistogramDataPoint(
            attributes=labels,
            start_time_unix_nano=_STARTED_NS,
            time_unix_nano=now_ns,
            count=counts[-1],
            sum=total.value,
            bucket_counts=apart,
            explicit_bounds=bounds[:-1],
            min=None,  # type: ignore[arg-type]  # not known: the field is optional on the wire
            max=None,  # type: ignore[arg-type]
        )
