"""Writes the dashboards of the chart, JSON for Grafana 10.4 and later, from dashboards/*.yaml.

Owns their layout and form; what is drawn stands in those files: rows of panels, of each its title,
unit and queries by legend. `@` in a query is the selector of the mesh that the reader has chosen.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SOURCES = Path(__file__).parent / "dashboards"
FOLDER = Path(__file__).parent / "infermesh" / "dashboards"
SELECTOR = 'namespace=~"$namespace"'
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA_VERSION = 39  # of Grafana 10.4; later ones migrate it
Panel = dict[str, Any]


def dashboard(description: dict[str, Any]) -> dict[str, Any]:
    """Grafana's JSON model of a description."""
    return {
        "uid": description["uid"],
        "title": description["title"],
        "tags": ["infermesh"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [_others()],
        "templating": {"list": [_datasource_variable(), _namespace_variable()]},
        "panels": _panels(description["rows"]),
    }


def _panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Three in a line, each row under a heading of its own."""
    found: list[Panel] = []
    y = 0
    for row in rows:
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        heading = {"type": "row", "title": row["title"], "collapsed": False, "panels": []}
        found.append({"id": len(found) + 1, "gridPos": place, **heading})
        y += 1
        for index, panel in enumerate(row["panels"]):
            line, column = divmod(index, _COLUMNS // _WIDTH)
            place = {"x": column * _WIDTH, "y": y + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            found.append(_panel(len(found) + 1, panel, place))
        y += -(-len(row["panels"]) * _WIDTH // _COLUMNS) * _HEIGHT
    return found


def _panel(number: int, panel: dict[str, Any], place: dict[str, int]) -> Panel:
    lines = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 5, "showPoints": "never"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel["title"],
        "description": panel.get("help", ""),
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel["unit"], "min": 0, "custom": lines},
            "overrides": [],
        },
        "options": {
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression.replace("@", SELECTOR),
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel["queries"].items())
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }


def _namespace_variable() -> dict[str, Any]:
    question = "label_values(infermesh_requests_inflight, namespace)"
    return {
        "name": "namespace",
        "label": "Namespace",
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": question,
        "query": {"query": question, "refId": "namespace"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # a Prometheus outside Kubernetes knows no namespaces
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _others() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "infermesh",
        "tags": ["infermesh"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
    }


def texts() -> dict[str, str]:
    """What each file of the chart's folder should be, by its name."""
    found = {}
    for path in sorted(SOURCES.glob("*.yaml")):
        made = dashboard(yaml.safe_load(path.read_text()))
        found[f"{path.stem}.json"] = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    return found


def main() -> int:
    """Writes all of them, and none besides."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name, text in texts().items():
        (FOLDER / name).write_text(text)
        sys.stdout.write(f"{FOLDER / name} is written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
