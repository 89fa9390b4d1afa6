"""Prometheus metrics named infermesh_*; without prometheus_client they count into nothing.

Owns the process's registry and the rules of its labels. What each metric means is said where it is
made; docs/metrics.md is written from here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

try:
    import prometheus_client as prometheus
except ImportError:  # a bare compute host
    prometheus = None  # type: ignore[assignment]
else:
    # a second series for each counter and histogram that says when it was made
    prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # upstream

PREFIX = "infermesh_"
# Seconds: from one decode step of a small model to a long generation.
TIME_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
# Between two tokens of a stream: narrow where objectives lie.
GAP_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0,
)  # fmt: skip
# From a request's arrival to its first or last token.
LATENCY_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0,
    10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
WAIT_BUCKETS = (0.001, 0.0025, *LATENCY_BUCKETS)
TOKEN_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
# What stands for a label's value that is none of those it may have.
OTHER = "other"


class Metric(Protocol):
    """What counters, gauges and histograms have in common, of each what it supports."""

    def labels(self, *values: str, **by_name: str) -> Self: ...
    def remove(self, *values: str) -> None: ...
    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...
    def set_function(self, read: Callable[[], float]) -> None: ...
    def observe(self, value: float) -> None: ...


class NoMetric:
    """Takes every call and keeps nothing."""

    def labels(self, *values: str, **by_name: str) -> Self:
        return self

    def remove(self, *values: str) -> None: ...
    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...
    def set_function(self, read: Callable[[], float]) -> None: ...
    def observe(self, value: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Description:
    """A metric as an operator reads of it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    doc: str


class BoundedLabel:
    """Values of one label: the first `most` are named, all others are "other"."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        """What to label with."""
        if value in self._known:
            return value
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(value)
        return value


# Models that are served: few, but over months there may be any number.
MODELS = BoundedLabel(64)

# name -> (kind and labels, metric)
_made: dict[str, tuple[Description, Any]] = {}


def _make(kind: str, name: str, doc: str, labels: Sequence[str], **more: Any) -> Any:
    if prometheus is None:
        return NoMetric()
    if name not in _made:
        made = getattr(prometheus, kind)(PREFIX + name, doc, tuple(labels), **more)
        _made[name] = (Description(PREFIX + name, kind.lower(), tuple(labels), doc), made)
    shape, metric = _made[name]
    assert (shape.kind, shape.labels) == (kind.lower(), tuple(labels)), f"two are named {name}"
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


def model_info() -> Metric:
    """What a process serves, to join its other metrics with."""
    return gauge(
        "model_info",
        "1; the model that is served is in the labels.",
        ("model", "dtype", "quantization"),
    )


def describe() -> list[Description]:
    """Every metric that this process has made, by name."""
    return sorted((description for description, _ in _made.values()), key=lambda d: d.name)


def families() -> Iterable[Any]:
    """All metrics of this process as prometheus_client has them; none without it."""
    return () if prometheus is None else prometheus.REGISTRY.collect()


def exposition() -> tuple[bytes, str]:
    """All metrics of this process in Prometheus' text format, and its content type."""
    if prometheus is None:
        return b"", "text/plain"
    return prometheus.generate_latest(), prometheus.CONTENT_TYPE_LATEST
