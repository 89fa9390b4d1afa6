"""The metrics of a mesh's processes at one moment, and what changed between two moments.

Reads what this mesh's own processes write (Prometheus' text format, values of labels without
escapes), so that the client's installation needs no library for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_PREFIX = "infermesh_"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)(?: [0-9]+)?$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Process:
    """One process's metrics.

    Attributes:
        samples: by name, without the mesh's prefix; of each its labels and value.
    """

    samples: Mapping[str, Mapping[Labels, float]]

    @property
    def service(self) -> str:
        """What runs there; empty where it does not say."""
        found = next(iter(self.samples.get("build_info", {})), frozenset())
        return dict(found).get("service", "")

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 where there is none."""
        wanted = labels.items()
        return sum(v for own, v in self.samples.get(name, {}).items() if wanted <= own)

    def values(self, name: str, label: str) -> dict[str, float]:
        """A metric's samples by one of its labels."""
        found: dict[str, float] = {}
        for labels, value in self.samples.get(name, {}).items():
            key = dict(labels).get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found

    def has(self, name: str) -> bool:
        """The process exports a sample of it."""
        return bool(self.samples.get(name))


@dataclass(frozen=True, slots=True)
class Scrape:
    """A mesh at one moment.

    Attributes:
        at_s: on a clock that never jumps.
        processes: by name; those that did not answer are in `silent`.
    """

    at_s: float
    processes: Mapping[str, Process]
    silent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One process between two scrapes."""

    name: str
    before: Process
    after: Process
    seconds: float

    def grew(self, metric: str, **labels: str) -> float:
        """By how much a counter grew; one that began anew has grown by what it is."""
        now = self.after.value(metric, **labels)
        before = self.before.value(metric, **labels)
        return now - before if now >= before else now

    def grew_by(self, metric: str, label: str) -> dict[str, float]:
        """The same by one of its labels, those that grew."""
        before = self.before.values(metric, label)
        found = {
            key: now - before.get(key, 0.0) for key, now in self.after.values(metric, label).items()
        }
        return {key: more for key, more in found.items() if more > 0}

    def mean(self, histogram: str, **labels: str) -> float | None:
        """Of what a histogram observed meanwhile; None where it observed nothing."""
        count = self.grew(f"{histogram}_count", **labels)
        return self.grew(f"{histogram}_sum", **labels) / count if count else None

    def lately(self, gauge: str) -> float:
        """A gauge's mean of both moments."""
        return (self.before.value(gauge) + self.after.value(gauge)) / 2


def changes(before: Scrape, after: Scrape, service: str) -> list[Change]:
    """The processes of one service that answered both times, by name."""
    seconds = after.at_s - before.at_s
    return [
        Change(name, before.processes[name], now, seconds)
        for name, now in sorted(after.processes.items())
        if name in before.processes and now.service == service
    ]


def parse(text: str) -> Process:
    """A process's metrics from its exposition; what is no sample of a number is left out."""
    samples: dict[str, dict[Labels, float]] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        name, labels, value = found[1].removeprefix(_PREFIX), found[2] or "", found[3]
        samples.setdefault(name, {})[frozenset(_LABEL.findall(labels))] = float(value)
    return Process(samples)
