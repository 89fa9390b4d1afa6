"""Prometheus metrics named infermesh_*; without prometheus_client they count into nothing."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

try:
    import prometheus_client as prometheus
except ImportError:  # a bare compute host
    prometheus = None  # type: ignore[assignment]

PREFIX = "infermesh_"
# Seconds: from one decode step of a small model to a long generation.
TIME_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class Metric(Protocol):
    """What counters, gauges and histograms have in common, of each what it supports."""

    def labels(self, *values: str, **by_name: str) -> Self: ...
    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...
    def observe(self, value: float) -> None: ...


class NoMetric:
    """Takes every call and keeps nothing."""

    def labels(self, *values: str, **by_name: str) -> Self:
        return self

    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...
    def observe(self, value: float) -> None: ...


# name -> (kind and labels, metric)
_made: dict[str, tuple[tuple[str, tuple[str, ...]], Any]] = {}


def _make(kind: str, name: str, doc: str, labels: Sequence[str], **more: Any) -> Any:
    if prometheus is None:
        return NoMetric()
    if name not in _made:
        made = getattr(prometheus, kind)(PREFIX + name, doc, tuple(labels), **more)
        _made[name] = ((kind, tuple(labels)), made)
    shape, metric = _made[name]
    assert shape == (kind, tuple(labels)), f"two metrics are named {name}"
    return metric


def counter(name: str, doc: str, labels: Sequence[str] = ()) -> Metric:
    """A count that only grows; name it *_total."""
    metric: Metric = _make("Counter", name, doc, labels)
    return metric


def gauge(name: str, doc: str, labels: Sequence[str] = ()) -> Metric:
    """A value that goes up and down."""
    metric: Metric = _make("Gauge", name, doc, labels)
    return metric


def histogram(
    name: str, doc: str, labels: Sequence[str] = (), buckets: Sequence[float] = TIME_BUCKETS
) -> Metric:
    """A distribution; name it by its unit, *_seconds or *_bytes."""
    metric: Metric = _make("Histogram", name, doc, labels, buckets=tuple(buckets))
    return metric


def exposition() -> tuple[bytes, str]:
    """All metrics of this process in Prometheus' text format, and its content type."""
    if prometheus is None:
        return b"", "text/plain"
    return prometheus.generate_latest(), prometheus.CONTENT_TYPE_LATEST
