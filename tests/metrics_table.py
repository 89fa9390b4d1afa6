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
    """Every metric of every service, by name."""
    sources = {service: _make_all(ROOT / folder, service) for service, folder in PACKAGES.items()}
    made = [one for one in metrics.describe() if not one.name.startswith("infermesh_probe_")]
    return [Listed(one, SHARED.get(one.name) or _whose(one, sources)) for one in made]


def _whose(metric: Description, sources: dict[str, str]) -> tuple[str, ...]:
    name = metric.name.removeprefix(metrics.PREFIX)
    return tuple(service for service, text in sources.items() if f'"{name}"' in text)


def _make_all(folder: Path, service: str) -> str:
    """Makes a package's metrics; the source of the modules that do."""
    text = ""
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text()
        if _MAKES.search(source):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            text += source
    if service == "scheduler":
        from services.scheduler.stats import Stats

        Stats()
    elif service == "gateway":
        from gateway.auth.metrics import connected

        connected()
    return text


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
