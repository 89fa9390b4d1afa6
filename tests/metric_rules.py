"""Prometheus' conventions for names, units and labels, held against a scrape.

The rules are those of promtool's linter (prometheus/prometheus, promlint) that the text can show,
and this mesh's own: a prefix, a help text that is a sentence, no label that could be unbounded.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

FOREIGN = ("process_", "python_")
_BASE_UNITS = ("seconds", "bytes", "ratio")
_OTHER_UNITS = {
    *("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "kilobytes"),
    *("megabytes", "gigabytes", "percent", "ms", "us", "ns", "sec", "secs", "kb", "mb", "gb"),
}
_COUNTERS = re.compile(r"^# TYPE (\S+) counter$", re.MULTILINE)
_UNBOUNDED = (
    "tenant",
    "user",
    "key",
    "request_id",
    "id",
    "prompt",
    "path",
    "error",
    "message",
    "ip",
)
_LONG_VALUE = 80


def problems(text: str) -> list[str]:
    """What a scrape does that the conventions forbid; empty where all is well."""
    nameless = [name for name in _COUNTERS.findall(text) if not name.endswith("_total")]
    found = [f"{name}: is a counter and does not end in _total" for name in nameless]
    return found + [
        f"{family.name}: {problem}"
        for family in text_string_to_metric_families(text)
        if not family.name.startswith(FOREIGN)
        for problem in _problems(family)
    ]


def _problems(family: Metric) -> Iterator[str]:
    names = {sample.name for sample in family.samples}
    words = family.name.split("_")
    if not family.name.startswith("infermesh_"):
        yield "does not begin with infermesh_"
    if family.type != "counter" and family.name.endswith("_total"):
        yield "ends in _total and is no counter"
    if family.type not in ("counter", "gauge", "histogram"):
        yield f"is of type {family.type}"
    if any(unit in words for unit in _OTHER_UNITS):
        yield "has a unit that is not a base unit"
    unit = next((unit for unit in _BASE_UNITS if unit in words), None)
    if unit is not None and words[-1] != unit:
        yield f"does not end in its unit, {unit}"
    if any(kind in words for kind in ("counter", "gauge", "histogram", "metric")):
        yield "names its type"
    if any(name.endswith("_created") for name in names):
        yield "has a _created series"
    first, last = family.documentation[:1], family.documentation[-1:]
    if last != "." or not (first.isupper() or first.isdigit()):
        yield f"its help is no sentence: {family.documentation!r}"
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label in _UNBOUNDED:
                yield f"has the label {label}, which nothing bounds"
            if len(value) > _LONG_VALUE and label != "replica":  # an address may be a path
                yield f"has a long value of {label}: {value!r}"


def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """The series of a scrape, by name and labels; those of the interpreter left out."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        if not family.name.startswith(FOREIGN)
        for sample in family.samples
    }


def promtool_problems(text: str) -> str:
    """What `promtool check metrics` says of a scrape; empty where all is well, or it is missing.

    What is not ours to name is left out.
    """
    program = shutil.which("promtool")  # Debian's package prometheus
    if program is None:
        return ""
    checked = subprocess.run(
        (program, "check", "metrics"), input=text, capture_output=True, text=True, check=False
    )
    lines = (checked.stdout + checked.stderr).splitlines()
    return "\n".join(line for line in lines if not line.startswith(FOREIGN))
