"""The registry as OpenTelemetry has it, and that nothing runs where no collector is named."""

import threading
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

from infermesh.telemetry import metrics, otlp_metrics

FACTS = {"service.name": "gateway", "service.version": "1"}


class Recorder:
    """An exporter that keeps what it is given, and says when."""

    def __init__(self) -> None:
        self.exports: list[Any] = []
        self.exported = threading.Event()
        self.is_shut = False

    def export(self, data: Any) -> None:
        self.exports.append(data)
        self.exported.set()

    def shutdown(self) -> None:
        self.is_shut = True


def exported(name: str) -> Any:
    """A metric as it goes over the wire."""
    request = encode_metrics(otlp_metrics.snapshot(FACTS))
    (resource,) = request.resource_metrics
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "gateway"
    (found,) = [m for m in resource.scope_metrics[0].metrics if m.name == f"infermesh_{name}"]
    return found


def test_counter_is_a_growing_sum_without_its_suffix() -> None:
    metrics.counter("probe_otlp_bytes_total", "Of this test.", ("by",)).labels("a").inc(3)
    found = exported("probe_otlp_bytes")
    (point,) = found.sum.data_points
    assert (found.sum.is_monotonic, point.as_double, found.unit) == (True, 3.0, "By")
    assert {pair.key: pair.value.string_value for pair in point.attributes} == {"by": "a"}


def test_gauge_is_a_gauge() -> None:
    metrics.gauge("probe_otlp_ratio", "Of this test.").set(0.5)
    (point,) = exported("probe_otlp_ratio").gauge.data_points
    assert point.as_double == 0.5


def test_histogram_has_counts_of_each_bucket_alone() -> None:
    made = metrics.histogram(
        "probe_otlp_seconds", "Of this test.", ("by",), buckets=(1.0, 2.0, 4.0)
    )
    for value in (0.5, 1.5, 1.6, 9.0):
        made.labels("a").observe(value)
    made.labels("b").observe(3.0)
    first, second = exported("probe_otlp_seconds").histogram.data_points
    assert list(first.bucket_counts) == [1, 2, 0, 1]
    assert list(second.bucket_counts) == [0, 0, 1, 0]
    assert list(first.explicit_bounds) == [1.0, 2.0, 4.0]
    assert (first.count, first.sum) == (4, pytest.approx(12.6))
    assert not first.HasField("min")


def test_exporter_sends_what_there_is_at_the_end() -> None:
    recorder = Recorder()
    exporter = otlp_metrics.Exporter("gateway", "1", recorder, interval_s=3600)
    assert not recorder.exports
    exporter.stop()
    assert len(recorder.exports) == 1
    assert recorder.is_shut


def test_exporter_sends_every_interval() -> None:
    recorder = Recorder()
    exporter = otlp_metrics.Exporter("gateway", "1", recorder, interval_s=0.001)
    assert recorder.exported.wait(10)
    exporter.stop()


@pytest.mark.parametrize(("endpoint", "interval_s"), [("", 1.0), ("http://127.0.0.1:1", 0.0)])
def test_nothing_runs_where_nothing_is_to_be_sent(endpoint: str, interval_s: float) -> None:
    before = threading.active_count()
    assert otlp_metrics.start("gateway", "1", endpoint, interval_s) is None
    assert threading.active_count() == before
