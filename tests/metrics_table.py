"""The tables of docs/metrics.md from the services' registries: `python -m tests.metrics_table`.

Owns their form; what a metric means is said where it is made, what holds for all above the tables.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from infermesh.telemetry import metrics
from infermesh.telemetry.metrics import Description

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "metrics.md"
EVERY = "every process"
# In this order: what a package finds made already is not its own.
PACKAGES = {
    EVERY: "infermesh",
    "gateway": "gateway",
    "auth": "services/auth",
    "cache": "services/cache",
    "scheduler": "services/scheduler",
    "shard": "services/shard",
}
# Of two services.
SHARED = {"infermesh_model_info": ("scheduler", "shard")}
_MAKES = re.compile(r"\bmetrics\.(counter|gauge|histogram|model_info)\b")
_UNITS = ("seconds", "bytes", "tokens", "ratio", "texts")
_TABLES = "<!-- from here on by `make metrics-table` -->\n"


@dataclass(frozen=True)
class Listed:
    """A metric and the services that export it."""

    metric: Description
    services: tuple[str, ...]

    @property
    def unit(self) -> str:
        parts = self.metric.name.split("_")
        return next((unit for unit in _UNITS if unit in parts[-2:]), "1")


def listed() -> list[Listed]:
    """Every metric of every service, in the order of services and names."""
    found: dict[str, Listed] = {}
    for service, folder in PACKAGES.items():
        _make_all(ROOT / folder, service)
        for metric in metrics.describe():
            if metric.name not in found and not metric.name.startswith("infermesh_probe_"):
                found[metric.name] = Listed(metric, SHARED.get(metric.name, (service,)))
    return list(found.values())


def _make_all(folder: Path, service: str) -> None:
    for path in sorted(folder.rglob("*.py")):
        if _MAKES.search(path.read_text()) and path.name != "metrics_table.py":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if service == "scheduler":
        from services.scheduler.stats import Stats

        Stats()
    elif service == "gateway":
        from gateway.auth.metrics import connected

        connected()


def page() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text().partition(_TABLES)[0] + _TABLES
    rows = listed()
    for service in PACKAGES:
        own = [row for row in rows if service in row.services]
        text += f"\n## {service[0].upper()}{service[1:]}\n\n"
        text += "| metric | type | unit | labels | meaning |\n| --- | --- | --- | --- | --- |\n"
        text += "".join(_row(row) for row in own)
    return text


def _row(row: Listed) -> str:
    metric = row.metric
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    doc = metric.doc.replace("|", "\\|")
    return f"| `{metric.name}` | {metric.kind} | {row.unit} | {labels} | {doc} |\n"


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
