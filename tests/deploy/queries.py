"""Which metrics and labels PromQL expressions name, held against those that services export.

Owns the reading of expressions and of docs/metrics.md, which another test holds current; what is
alerted on or drawn is not its affair.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import promql_parser as promql

from tests.deploy.chart import ROOT

METRICS_PAGE = ROOT / "docs" / "metrics.md"
# What a scrape adds, whoever scrapes. `endpoint` and `service` are Prometheus' operator's: a
# metric's own label of that name is renamed there, so no query may rely on it.
TARGET_LABELS = frozenset({"namespace", "job", "instance", "pod"})
_RENAMED = frozenset({"endpoint", "service", "container"})
# Of prometheus_client and of Prometheus itself.
_BESIDES: Mapping[str, frozenset[str]] = {
    "up": frozenset(),
    "ALERTS": frozenset({"alertname", "alertstate", "severity"}),
    "process_start_time_seconds": frozenset(),
    "process_cpu_seconds_total": frozenset(),
    "process_resident_memory_bytes": frozenset(),
    "process_open_fds": frozenset(),
    "process_max_fds": frozenset(),
}
_ROW = re.compile(r"^\| `(infermesh_\w+)` \| (\w+) \| [^|]+ \| ([^|]*) \|", re.M)


@dataclass(frozen=True, slots=True)
class Selection:
    """One selector of an expression."""

    metric: str
    matchers: tuple[tuple[str, str], ...]


def exported() -> dict[str, frozenset[str]]:
    """Every series that a process may export, with its own labels."""
    found = dict(_BESIDES)
    for name, kind, labels in _ROW.findall(METRICS_PAGE.read_text()):
        own = frozenset(re.findall(r"`(\w+)`", labels))
        if kind == "histogram":
            found[f"{name}_bucket"] = own | {"le"}
            found[f"{name}_sum"] = found[f"{name}_count"] = own
        else:
            found[name] = own
    return found


def selections(expression: str) -> list[Selection]:
    """Every selector in it. Raises ValueError where it is no PromQL."""
    found: list[Selection] = []

    def visit(node: promql.Expr) -> None:
        vector = node.vector_selector if isinstance(node, promql.MatrixSelector) else node
        if isinstance(vector, promql.VectorSelector):
            matchers = tuple((m.name, m.value) for m in vector.matchers.matchers)
            found.append(Selection(vector.name or "", matchers))

    promql.walk(promql.parse(expression), visit)
    return found


def grouped_by(expression: str) -> set[str]:
    """Every label that it groups by, matches on or takes away."""
    found: set[str] = set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            found.update(node.modifier.labels)
        elif isinstance(node, promql.BinaryExpr) and node.modifier is not None:
            matching = node.modifier.matching
            found.update([] if matching is None else matching.labels)
            found.update(node.modifier.group_labels or [])

    promql.walk(promql.parse(expression), visit)
    return found


def complaints(expression: str, known: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """What an expression names that nobody exports."""
    labels: set[str] = set()
    for selection in selections(expression):
        if selection.metric not in known:
            yield f"nobody exports {selection.metric}"
            continue
        own = known[selection.metric]
        labels |= own
        for label, _ in selection.matchers:
            if label in _RENAMED or label not in own | TARGET_LABELS:
                yield f"{selection.metric} has no label {label} in every installation"
    for label in grouped_by(expression) - TARGET_LABELS:
        if label in _RENAMED or label not in labels:
            yield f"nothing in it has a label {label}"
